"""Models of images and texts (CLIP, SigLIP): how well a text fits an image, or a region of it (docs/clip.md).

Nothing is fetched: a model is a folder that ``save_pretrained`` wrote or a hub's client downloaded, with the model's
``config.json`` and weights, its tokenizer and its ``preprocessor_config.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray import hub
from milan_ray.config import models_dir
from milan_ray.errors import MilanError, reason
from milan_ray.models.transformers_zoo import import_transformers
from milan_ray.models.view import View
from milan_ray.models.weights import weights_digest
from milan_ray.names import checked_name
from milan_ray.textfiles import read_text

DEFAULT = "clip-vit-base-patch32"
"""The reference's model, CLIP ViT-B/32."""

KINDS = ("clip", "siglip")
"""The architectures whose attention is known here, as ``model_type`` names them."""

BATCH_SIZE = 16
"""Regions per pass."""

TEXTS = 64
"""Texts per pass."""

_LENGTHS = 8
"""Texts are padded to a multiple of so many tokens: few passes differ in shape, and no pad depends on other texts."""


class Embedder(Protocol):
    """What puts images and texts into one space, where the product of two embeddings says how well they fit."""

    @property
    def width(self) -> int:
        """D, the size of embeddings."""

    @property
    def view(self) -> View | None:
        """What of an image it looks at; None where it reads the probe's concept maps instead of pixels."""

    def identity(self) -> dict[str, object]:
        """All that decides embeddings of images besides the images."""

    def text_identity(self) -> dict[str, object]:
        """All that decides embeddings of texts."""

    def to(self, device: torch.device) -> Any:
        """The embedder, moved."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] as float32 (N, D); only where there is a view."""

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Concept maps of N images as float32 (N, D); only where there is no view."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts as float32 (N, D)."""


CONCEPTS_FILE = "concepts.txt"
"""Where a model's folder may bring a list of concepts of its own."""

_REGISTERED: dict[str, Callable[[], Embedder]] = {}
_CONCEPTS: dict[str, tuple[str, ...]] = {}


def register_image_text(name: str, factory: Callable[[], Embedder], concepts: Sequence[str] = ()) -> None:
    """Registers a model of images and texts of one's own; a later registration of the same name replaces it.

    Args:
        name: Name used in place of a folder.
        factory: Builds it, on the CPU.
        concepts: What it knows, as the list of concepts where none is given.
    """
    checked_name("a model of images and texts", name, slashes=True)
    _REGISTERED[name], _CONCEPTS[name] = factory, tuple(concepts)


def own_concepts(folder: str) -> tuple[str, ...]:
    """The list of concepts that a model of images and texts brings: registered, or the lines of a file in its folder.

    Args:
        folder: As :func:`find_image_text` gives it.
    """
    if folder in _REGISTERED:
        return _CONCEPTS[folder]
    file = Path(folder) / CONCEPTS_FILE
    return tuple(read_text(file).splitlines()) if file.is_file() else ()


def is_registered(name: str) -> bool:
    """Whether a name is one of :func:`register_image_text`."""
    return name in _REGISTERED


@dataclass(frozen=True)
class ImageTextRef:
    """A model of images and texts as it travels to workers.

    Attributes:
        folder: Its folder as :func:`find_image_text` gives it, or a registered name.
    """

    folder: str

    @property
    def name(self) -> str:
        """Its name in tables."""
        return Path(self.folder).name if Path(self.folder).is_absolute() else self.folder

    def load(self) -> Embedder:
        """Builds it, on the CPU.

        Raises:
            MilanError: It is missing or damaged.
        """
        return _REGISTERED[self.folder]() if self.folder in _REGISTERED else ImageText(self.folder)


def find_image_text(name: str) -> str:
    """Finds the folder of a model of images and texts.

    Args:
        name: A folder; or the name of one in ``$MILAN_MODELS_DIR``; or a registered name.

    Returns:
        Its absolute path; a registered name as it is.

    Raises:
        MilanError: There is none; the sentence names what is looked for, where, the variable, and how to get it.
    """
    if name in _REGISTERED:
        return name
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.absolute())
    if folder.parent != Path("."):
        hint = "or name the folder of a CLIP or SigLIP model, as transformers saves it, with --clip"
        hub.find("config.json", [folder], hint=hint)
    target = models_dir() / name
    fetch = f"`hf download openai/{DEFAULT} --local-dir {target}` does" if name == DEFAULT else "save the model there"
    hint = f"{fetch}, or name the folder of another CLIP or SigLIP model with --clip"
    path = hub.find(f"{name}/config.json", [models_dir()], variable="MILAN_MODELS_DIR", hint=hint)
    return str(path.parent)


class ImageText(nn.Module):
    """A CLIP or SigLIP model in eval mode, without gradients, float32.

    Embeddings have length 1, so that the product of two is their cosine.

    Attributes:
        name: The folder's name.
        size: Side of its square input images, pixels.
        grid: Patches along each side.
        width: D, the size of embeddings.
        length: Most tokens of a text, begin and end included.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        """Loads a model on the CPU.

        Args:
            folder: As :func:`find_image_text` gives it.

        Raises:
            MilanError: transformers is not installed, the folder is no CLIP or SigLIP model, or its files are damaged.
        """
        super().__init__()
        self.name = Path(folder).name
        model, self.tokenizer, processor = _read(folder)
        self.model = model.float()
        self.kind: str = model.config.model_type
        vision = model.config.vision_config
        self.size: int = vision.image_size
        self.grid: int = vision.image_size // vision.patch_size
        self.width: int = vision.hidden_size if self.kind == "siglip" else model.config.projection_dim
        self.length: int = model.config.text_config.max_position_embeddings
        self.register_buffer("mean", torch.tensor(processor["image_mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor["image_std"]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def feature_size(self) -> int:
        """Size of what :meth:`pool` gives."""
        return 2 * self.width

    @property
    def view(self) -> View:
        """What of an image such models look at: SigLIP squashes it, CLIP takes the middle of it."""
        if self.kind == "siglip":
            return View((self.size, self.size), None, "bicubic")
        return View(self.size, self.size, "bicubic")

    def identity(self) -> dict[str, object]:
        """All that decides embeddings of images and regions besides the images."""
        return {
            "weights": weights_digest(self.model),
            "structure": hashlib.sha256(repr(self.model).encode()).hexdigest(),
            "size": self.size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def text_identity(self) -> dict[str, object]:
        """All that decides embeddings of texts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else {"vocabulary": sorted(self.tokenizer.get_vocab().items())}
        # What the last call cut and padded to stays behind in a tokenizer.
        text = json.dumps({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})
        return {"weights": weights_digest(self.model), "tokenizer": hashlib.sha256(text.encode()).hexdigest()}

    # -- images and regions -----------------------------------------------------------------------------------

    def fit(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] at the model's size; what is not square is squashed, as in the reference."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        shape = (self.size, self.size)
        # Bicubic overshoots; Pillow, which made the images that such models learned from, cuts that off.
        return F.interpolate(images, size=shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """What embeddings of any number of regions of some images start from, and the embeddings of the whole images.

        Args:
            images: (N, 3, size, size) in [0, 1].

        Returns:
            For CLIP the normalised images (N, 3, size, size), because masks enter at the first block; for SigLIP, where
            they enter at the end, the tokens of the last block (N, patches, C). Then (N, D).
        """
        pixels = (images - self.mean) / self.std
        vision = self.model.vision_model
        encoded = vision(pixel_values=pixels)
        if self.kind == "clip":
            return [pixels, F.normalize(self.model.visual_projection(encoded.pooler_output), dim=1)]
        return [encoded.last_hidden_state, F.normalize(encoded.pooler_output, dim=1)]

    @torch.no_grad()
    def pool(self, maps: Sequence[Tensor], masks: Tensor, index: Tensor) -> Tensor:
        """Embeds regions, each beside the whole of its image.

        In every block of CLIP's image tower, the weights that the CLS token's attention gives to patches are multiplied
        by the mask, and not renormalised; what it gives to itself and all other tokens' attention stay as they
        are. SigLIP has no CLS token: there it is the weights of the pooling head, the one place where an
        embedding is gathered from patches.

        Args:
            maps: As :meth:`maps` gives them, of N images.
            masks: (M, H, W), any float or bool; values in [0, 1].
            index: Which image each mask belongs to, int64 (M,) in [0, N).

        Returns:
            float32 (M, 2 D): the region's embedding, then the image's.
        """
        sources, whole = maps
        weights = self.patch_weights(masks)
        regions = whole.new_empty(len(masks), whole.shape[1])
        for start in range(0, len(masks), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            count = len(index[rows])
            # A full batch always: the last bits of a region must not depend on its neighbours' number.
            source = _padded(sources[index[rows]], BATCH_SIZE)
            regions[rows] = self._regions(source, _padded(weights[rows], BATCH_SIZE))[:count]
        return torch.cat([regions, whole[index]], dim=1)

    def patch_weights(self, masks: Tensor) -> Tensor:
        """Masks (M, H, W) as weights of patches (M, grid²): downsampled bilinearly.

        Without antialiasing, as in the reference: a small region can vanish. Then the CLS token sees itself alone, and
        the embedding says next to nothing of the image.
        """
        grid = (self.grid, self.grid)
        masks = masks.to(self.mean.dtype).unsqueeze(1)
        return F.interpolate(masks, size=grid, mode="bilinear", align_corners=False).flatten(1)

    def _regions(self, source: Tensor, weights: Tensor) -> Tensor:
        vision = self.model.vision_model
        if self.kind == "siglip":
            return F.normalize(_pool_siglip(vision.head, source, weights), dim=1)
        tokens = vision.pre_layrnorm(vision.embeddings(source))
        kept = torch.cat([weights.new_ones(len(weights), 1), weights], dim=1)[:, None, None, :]
        for block in vision.encoder.layers:
            tokens = tokens + _attend(block.self_attn, block.layer_norm1(tokens), kept)
            tokens = tokens + block.mlp(block.layer_norm2(tokens))
        return F.normalize(self.model.visual_projection(vision.post_layernorm(tokens[:, 0])), dim=1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds whole images; each as if it were alone.

        Args:
            images: (N, 3, H, W) in [0, 1], of any one size.

        Returns:
            float32 (N, D).
        """
        found = [images.new_zeros(0, self.width)]
        for start in range(0, len(images), BATCH_SIZE):
            some = images[start : start + BATCH_SIZE]
            found.append(self.maps(_padded(self.fit(some), BATCH_SIZE))[1][: len(some)])
        return torch.cat(found)

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Not for models that see pixels.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.name} looks at pixels, not at concept maps")

    # -- texts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts; each as if it were alone, within float error.

        Args:
            texts: N texts; what is beyond the model's length is cut off.

        Returns:
            float32 (N, D).
        """
        device = self.mean.device
        if not texts:
            return torch.zeros(0, self.width, device=device)
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            # SigLIP reads the last token, padding or not, and learned with all of it.
            length = self.length if self.kind == "siglip" else math.ceil(len(row) / _LENGTHS) * _LENGTHS
            groups.setdefault(min(length, self.length), []).append(place)
        found: dict[int, Tensor] = {}
        for length, places in groups.items():
            for start in range(0, len(places), TEXTS):
                some = places[start : start + TEXTS]
                ids = torch.full((TEXTS, length), self.tokenizer.pad_token_id)
                for number, place in enumerate(some):
                    ids[number, : len(rows[place])] = torch.tensor(rows[place])
                ids[len(some) :] = ids[0]
                pooled = self.model.text_model(input_ids=ids.to(device)).pooler_output
                if self.kind == "clip":
                    pooled = self.model.text_projection(pooled)
                found.update(zip(some, F.normalize(pooled, dim=1)[: len(some)], strict=True))
        return torch.stack([found[place] for place in range(len(texts))])


def _attend(attention: nn.Module, tokens: Tensor, kept: Tensor) -> Tensor:
    """Self-attention of tokens (M, T, C), the CLS token's weights multiplied by ``kept`` (M, 1, 1, T)."""
    layer: Any = attention
    query, key, value = (
        project(tokens).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    weights = (query[:, :, :1] @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3) * kept
    mixed = torch.cat([weights @ value, mixed[:, :, 1:]], dim=2)
    return layer.out_proj(mixed.transpose(1, 2).flatten(2))


def _pool_siglip(head: nn.Module, tokens: Tensor, kept: Tensor) -> Tensor:
    """SigLIP's pooling of tokens (M, P, C), its probe's attention weights multiplied by ``kept`` (M, P)."""
    pooling: Any = head
    attention = pooling.attention
    inputs = pooling.probe.expand(len(tokens), -1, -1), tokens, tokens
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(given, weight, bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for given, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    shares = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3) * kept[:, None, None, :]
    mixed = attention.out_proj((shares @ value).transpose(1, 2).flatten(2))
    return (mixed + pooling.mlp(pooling.layernorm(mixed)))[:, 0]


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


def _read(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and the settings of its image processor."""
    transformers = import_transformers("models of images and texts come")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if config.model_type not in KINDS or not getattr(config.vision_config, "vision_use_head", True):
            raise MilanError(
                f"{folder} is a model of type {config.model_type!r}: give the folder of a CLIP or SigLIP model."
            )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **local).to_dict()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        model, report = transformers.AutoModel.from_pretrained(folder, config=config, output_loading_info=True, **local)
    except MilanError:
        raise
    except Exception as error:  # whatever transformers' readers raise on absent, damaged or unfit files
        raise MilanError(
            f"the model of images and texts in {folder} cannot be loaded ({reason(error)}): it needs config.json, "
            "model.safetensors, the tokenizer's files and preprocessor_config.json of a CLIP or SigLIP model."
        ) from error
    if missing := _essential(report["missing_keys"]):
        raise MilanError(
            f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more: save the model again."
        )
    return model, tokenizer, processor


def _essential(names: Iterable[str]) -> list[str]:
    # Old files lack what is no weight.
    return sorted(name for name in names if not name.endswith(("position_ids", "logit_scale", "logit_bias")))
