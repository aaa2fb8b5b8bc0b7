"""Image-text models (CLIP, SigLIP): how well a text matches an image, or a region of it (docs/clip.md).

Nothing is downloaded: a model is a folder that ``save_pretrained`` wrote or a hub's client downloaded, with the model's
``config.json`` and weights, its tokenizer and its ``preprocessor_config.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray.device import to_device
from milan_ray.errors import MilanError, explained
from milan_ray.models.folders import LOCAL, check_complete, find_folder, import_transformers
from milan_ray.models.registry import BUILDING
from milan_ray.models.view import View
from milan_ray.models.weights import weights_digest
from milan_ray.names import checked_name
from milan_ray.textfiles import read_text

DEFAULT = "clip-vit-base-patch32"
"""The reference's model, CLIP ViT-B/32."""

KINDS = ("clip", "siglip")
"""Supported architectures, by their ``model_type``."""

BATCH_SIZE = 16
"""Regions per pass."""

TEXTS = 64
"""Texts per pass."""

_LENGTHS = 8
"""Texts are padded to a multiple of this number of tokens: few passes differ in shape, and a text's padding does not
depend on other texts."""


class Embedder(Protocol):
    """Embeds images and texts in one space, where the product of two embeddings measures how well they match."""

    @property
    def width(self) -> int:
        """D, the size of embeddings."""

    @property
    def view(self) -> View | None:
        """The part of an image that it reads; None where it reads the probe's concept maps instead of pixels."""

    def identity(self) -> dict[str, object]:
        """Everything that determines embeddings of images besides the images."""

    def text_identity(self) -> dict[str, object]:
        """Everything that determines embeddings of texts."""

    def to(self, device: torch.device) -> Any:
        """Moves the embedder to a device and returns it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds images (N, 3, H, W) in [0, 1] as float32 (N, D); only where there is a view."""

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Embeds the concept maps of N images as float32 (N, D); only where there is no view."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as float32 (N, D)."""


CONCEPTS_FILE = "concepts.txt"
"""Optional file in a model's folder with the model's own list of concepts."""

_REGISTERED: dict[str, Callable[[], Embedder]] = {}
_CONCEPTS: dict[str, tuple[str, ...]] = {}


def register_image_text(name: str, factory: Callable[[], Embedder], concepts: Sequence[str] = ()) -> None:
    """Registers a custom image-text model; a later registration of the same name replaces it.

    Args:
        name: Name used in place of a folder.
        factory: Builds the model, on the CPU.
        concepts: The model's own list of concepts, used where none is given.
    """
    checked_name("a model of images and texts", name, slashes=True)
    _REGISTERED[name], _CONCEPTS[name] = factory, tuple(concepts)


def own_concepts(folder: str) -> tuple[str, ...]:
    """The list of concepts of an image-text model: registered, or the lines of a file in its folder.

    Args:
        folder: As returned by :func:`find_image_text`.
    """
    if folder in _REGISTERED:
        return _CONCEPTS[folder]
    file = Path(folder) / CONCEPTS_FILE
    return tuple(read_text(file).splitlines()) if file.is_file() else ()


def is_registered(name: str) -> bool:
    """Whether a name was registered with :func:`register_image_text`."""
    return name in _REGISTERED


@dataclass(frozen=True)
class ImageTextRef:
    """Reference to an image-text model, small enough to send to workers.

    Attributes:
        folder: Its folder as returned by :func:`find_image_text`, or a registered name.
    """

    folder: str

    @property
    def name(self) -> str:
        """Its name in tables."""
        return Path(self.folder).name if Path(self.folder).is_absolute() else self.folder

    def load(self) -> Embedder:
        """Builds the model, on the CPU.

        Raises:
            MilanError: The model is missing or damaged.
        """
        return _REGISTERED[self.folder]() if self.folder in _REGISTERED else ImageText(self.folder)


def find_image_text(name: str) -> str:
    """Finds the folder of an image-text model.

    Args:
        name: A folder, the name of one in ``$MILAN_MODELS_DIR``, or a registered name.

    Returns:
        Its absolute path; a registered name unchanged.

    Raises:
        MilanError: There is no such folder; the message names the missing file, the places searched, the environment
            variable, and how to get the file.
    """
    if name in _REGISTERED:
        return name
    return find_folder(name, "the folder of another CLIP or SigLIP model with --clip", f"openai/{DEFAULT}")


class ImageText(nn.Module):
    """A CLIP or SigLIP model in eval mode, without gradients, float32.

    Embeddings have length 1, so that the product of two is their cosine.

    Attributes:
        name: The folder's name.
        size: Side of its square input images, pixels.
        grid: Patches along each side.
        width: D, the size of embeddings.
        length: Maximum number of tokens of a text, begin and end tokens included.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        """Loads a model on the CPU.

        Args:
            folder: As returned by :func:`find_image_text`.

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
        """Size of the vectors that :meth:`pool` returns."""
        return 2 * self.width

    @property
    def view(self) -> View:
        """The part of an image that the model reads: SigLIP squashes the image, CLIP crops its centre."""
        if self.kind == "siglip":
            return View((self.size, self.size), None, "bicubic")
        return View(self.size, self.size, "bicubic")

    def identity(self) -> dict[str, object]:
        """Everything that determines embeddings of images and regions besides the images."""
        return {
            "weights": weights_digest(self.model),
            "structure": hashlib.sha256(repr(self.model).encode()).hexdigest(),
            "size": self.size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def text_identity(self) -> dict[str, object]:
        """Everything that determines embeddings of texts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else {"vocabulary": sorted(self.tokenizer.get_vocab().items())}
        # A tokenizer stores the truncation and padding of its last call; they are not part of its identity.
        text = json.dumps({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})
        return {"weights": weights_digest(self.model), "tokenizer": hashlib.sha256(text.encode()).hexdigest()}

    # -- images and regions -----------------------------------------------------------------------------------

    def fit(self, images: Tensor) -> Tensor:
        """Resizes images (N, 3, H, W) in [0, 1] to the model's size; squashes non-square ones, as in the reference."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        shape = (self.size, self.size)
        # Bicubic interpolation overshoots; Pillow, which resized these models' training images, clips that.
        return F.interpolate(images, size=shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Computes the inputs of :meth:`pool` for any number of regions, and the embeddings of the whole images.

        Args:
            images: (N, 3, size, size) in [0, 1].

        Returns:
            First the inputs: for CLIP the normalised images (N, 3, size, size), because masks act from the first block
            on; for SigLIP, where masks act at the end, the tokens of the last block (N, patches, C). Then the
            embeddings (N, D).
        """
        pixels = (images - self.mean) / self.std
        vision = self.model.vision_model
        encoded = vision(pixel_values=pixels)
        if self.kind == "clip":
            return [pixels, F.normalize(self.model.visual_projection(encoded.pooler_output), dim=1)]
        return [encoded.last_hidden_state, F.normalize(encoded.pooler_output, dim=1)]

    @torch.no_grad()
    def pool(self, maps: Sequence[Tensor], masks: Tensor, index: Tensor) -> Tensor:
        """Embeds regions, each together with its whole image.

        In every block of CLIP's image tower, the weights that the CLS token's attention gives to patches are multiplied
        by the mask, and not renormalised. Its weight for itself, and the attention of all other tokens, stay unchanged.
        SigLIP has no CLS token: there, the weights of the pooling head are multiplied, the only place where an
        embedding is combined from patches.

        Args:
            maps: As returned by :meth:`maps`, for N images.
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
            # Always a full batch: the last bits of a region's embedding must not depend on the number of regions.
            source = _padded(sources[index[rows]], BATCH_SIZE)
            regions[rows] = self._regions(source, _padded(weights[rows], BATCH_SIZE))[:count]
        return torch.cat([regions, whole[index]], dim=1)

    def patch_weights(self, masks: Tensor) -> Tensor:
        """Masks (M, H, W) as weights of patches (M, grid²): downsampled bilinearly.

        There is no antialiasing, as in the reference, so that a small region can vanish. Then the CLS token attends
        only to itself, and the embedding contains almost nothing of the image.
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
        """Embeds whole images; an embedding does not depend on the other images.

        Args:
            images: (N, 3, H, W) in [0, 1], of any size.

        Returns:
            float32 (N, D).
        """
        embeddings = [images.new_zeros(0, self.width)]
        for start in range(0, len(images), BATCH_SIZE):
            some = images[start : start + BATCH_SIZE]
            embeddings.append(self.maps(_padded(self.fit(some), BATCH_SIZE))[1][: len(some)])
        return torch.cat(embeddings)

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Not supported: this model reads pixels, not concept maps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.name} looks at pixels, not at concept maps")

    # -- texts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts; an embedding does not depend on the other texts, within floating-point error.

        Args:
            texts: N texts; tokens beyond the model's length are cut off.

        Returns:
            float32 (N, D).
        """
        device = self.mean.device
        if not texts:
            return torch.zeros(0, self.width, device=device)
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            # SigLIP reads the last token, padding or not, and was trained with full padding.
            length = self.length if self.kind == "siglip" else math.ceil(len(row) / _LENGTHS) * _LENGTHS
            groups.setdefault(min(length, self.length), []).append(place)
        embeddings: dict[int, Tensor] = {}
        for length, places in groups.items():
            for start in range(0, len(places), TEXTS):
                some = places[start : start + TEXTS]
                ids = torch.full((TEXTS, length), self.tokenizer.pad_token_id)
                for number, place in enumerate(some):
                    ids[number, : len(rows[place])] = torch.tensor(rows[place])
                ids[len(some) :] = ids[0]
                pooled = self.model.text_model(input_ids=to_device(ids, device)).pooler_output
                if self.kind == "clip":
                    pooled = self.model.text_projection(pooled)
                embeddings.update(zip(some, F.normalize(pooled, dim=1)[: len(some)], strict=True))
        return torch.stack([embeddings[place] for place in range(len(texts))])


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
    needs = (
        "it needs config.json, model.safetensors, the tokenizer's files and preprocessor_config.json of a CLIP or "
        "SigLIP model."
    )
    with BUILDING, explained(f"the model of images and texts in {folder} cannot be loaded", needs):
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        if config.model_type not in KINDS or not getattr(config.vision_config, "vision_use_head", True):
            raise MilanError(
                f"{folder} is a model of type {config.model_type!r}: give the folder of a CLIP or SigLIP model."
            )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL).to_dict()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
        model, report = transformers.AutoModel.from_pretrained(folder, config=config, output_loading_info=True, **LOCAL)
    # Old files lack these entries, which embeddings do not need from a file.
    needless = ("position_ids", "logit_scale", "logit_bias")
    missing = [name for name in report["missing_keys"] if not name.endswith(needless)]
    check_complete(missing, folder, ": save the model again")
    return model, tokenizer, processor
