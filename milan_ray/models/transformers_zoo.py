"""Vision models of transformers, named ``hf/FOLDER`` or ``hf/ID``; transformers itself is optional.

Nothing is downloaded: a model is a folder written by ``save_pretrained``, or lies in the Hugging Face cache.
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from milan_ray.device import without_weights
from milan_ray.errors import MilanError, explained
from milan_ray.models.blocks import blocks
from milan_ray.models.folders import LOCAL, check_complete, import_transformers
from milan_ray.models.hooks import LayerTap
from milan_ray.models.processors import fit
from milan_ray.models.registry import OUTPUTS, RANDOM, TOKEN_BATCH, ModelSpec, register_family
from milan_ray.models.view import Preprocess
from milan_ray.models.weights import read_state_dict, read_weights
from milan_ray.models.weights_fit import UnfitWeights

_MLP = re.compile(r".*\.(mlp\.fc1|intermediate\.dense|mlp\.up_proj)")
_STAGE = re.compile(r"(.*\.)?stages\.\d+")


def resolve(source: str) -> ModelSpec:
    """Describes a vision model: preprocessing from its image processor, prefix tokens from its patches.

    The default layers are the MLPs' hidden units before the activation in transformers, else the stages, else the
    blocks. For an image-text model, the image tower is described.

    Args:
        source: Folder of the model, or its id in the Hugging Face cache.

    Raises:
        MilanError: transformers is not installed, there is no such model, or a view cannot make its inputs.
    """
    transformers = import_transformers()
    source = str(Path(source).expanduser().absolute()) if Path(source).expanduser().is_dir() else source
    absent = (
        f"hf/{source} is neither a folder with a vision model's config.json, model.safetensors and "
        "preprocessor_config.json nor in the Hugging Face cache"
    )
    with explained(absent, f"give such a folder, or run `hf download {source}`.", OSError, ValueError):
        config = transformers.AutoConfig.from_pretrained(source, **LOCAL)
        processor = _processor(transformers, source)
    preprocess, swapped = _preprocess(source, processor)
    with without_weights():
        model = _vision(transformers.AutoModel.from_config(_unmasked(config))).eval()
    masked = _patches(model, preprocess) if _shuffles_patches(model) else 0
    paths = [path for path, _ in model.named_modules()]
    mlps = tuple(filter(_MLP.fullmatch, paths))
    patches = _patches(model, preprocess) if isinstance(getattr(model.config, "patch_size", None), int) else 0
    prefix = None
    if mlps and patches:
        height, width = preprocess.view.shape
        with LayerTap(model, mlps[:1]) as tap, torch.no_grad():
            (tokens,) = tap({"pixel_values": torch.zeros(1, 3, height, width, device="meta")}).values()
        if len(tokens) != 1:  # one row per window, or per pixel of a patch (MobileViT)
            mlps = ()
        elif tokens.ndim == 3:
            prefix = tokens.shape[1] - patches
    return ModelSpec(
        f"hf/{source}",
        partial(build, source),
        mlps or tuple(filter(_STAGE.fullmatch, paths)) or blocks(model) or (OUTPUTS,),
        preprocess,
        partial(_inputs, preprocess, swapped, masked),
        prefix_tokens=prefix,
        max_batch=TOKEN_BATCH if mlps else None,
    )


def build(source: str, weights: str | None) -> nn.Module:
    """Builds a model with its own weights, those of a file, or untrained ones from seed 0.

    Raises:
        MilanError: Weights are missing or do not fit.
    """
    transformers = import_transformers()
    config = _unmasked(transformers.AutoConfig.from_pretrained(source, **LOCAL))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # also for a pooler that was not saved; nothing that is dissected depends on it
        if weights == RANDOM:
            return _vision(transformers.AutoModel.from_config(config)).float()
        with without_weights():
            empty = transformers.AutoModel.from_config(config)
        kind, state = type(empty), None if weights is None else _state(weights, empty)
        with explained(f"the weights in {weights or source} cannot be loaded", "save the model again."):
            model, report = kind.from_pretrained(
                source if weights is None else None,
                config=config,
                state_dict=state,
                local_files_only=True,
                output_loading_info=True,
            )
    missing = [name for name in report["missing_keys"] if "pooler." not in name]
    check_complete(missing, weights or source, f" of {source}")
    return _vision(model).float()


def _state(weights: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a file, under the network's names; where these do not fit, under the file's for transformers."""
    try:
        return read_weights(weights, model, needless=lambda name: "pooler." in name)
    except UnfitWeights:  # e.g. names of earlier versions; the result of transformers' conversion is checked
        return read_state_dict(weights)


def _vision(model: nn.Module) -> nn.Module:
    return model.get_submodule("vision_model") if hasattr(model, "vision_model") else model


def _unmasked(config: Any) -> Any:
    """Switches off masking in the configuration of a masked autoencoder, so that it reads whole images."""
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    return config


def _shuffles_patches(model: nn.Module) -> bool:
    """Whether a network sorts its patches by random numbers, to mask some of them."""
    able = "noise" in inspect.signature(model.forward).parameters and hasattr(model.config, "mask_ratio")
    return able and getattr(getattr(model, "embeddings", None), "is_mae", True)


def _patches(model: nn.Module, preprocess: Preprocess) -> int:
    """Number of patches of a view."""
    (height, width), patch = preprocess.view.shape, int(getattr(model.config, "patch_size", 1))
    return (height // patch) * (width // patch)


def _inputs(preprocess: Preprocess, swapped: bool, masked: int, views: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network takes: pixels, and numbers by which it sorts its patches, if it does, so that they stay sorted."""
    pixels = preprocess(views)
    inputs = {"pixel_values": pixels.flip(1) if swapped else pixels}
    if masked:
        order = torch.arange(masked, dtype=torch.float32, device=pixels.device)
        inputs["noise"] = order.expand(len(pixels), masked)
    return inputs


def _processor(transformers: ModuleType, source: str) -> Any:
    """The image processor of a folder; where there are two, the one that works on PIL images, as a view does."""
    images = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    return transformers.AutoImageProcessor.from_pretrained(source, **images, **LOCAL)


_FITTED: dict[tuple[str, str], tuple[Preprocess, bool]] = {}


def _preprocess(source: str, processor: Any) -> tuple[Preprocess, bool]:
    """The view and normalisation that reproduce an image processor, and whether its networks expect blue first.

    Raises:
        MilanError: No view reproduces it: its images vary in size, or are made in another way.
    """

    def process(image: Image.Image) -> np.ndarray:
        made = processor(images=image, return_tensors="np")
        if any(name.endswith("mask") and not np.all(values) for name, values in made.items()):
            return np.zeros(0)
        (inputs,) = np.asarray(made["pixel_values"], np.float32)
        return inputs

    key = type(processor).__qualname__, processor.to_json_string()
    if key not in _FITTED:
        try:
            _FITTED[key] = fit(process, processor.to_dict())
        except MilanError as error:
            raise MilanError(
                f"the images that hf/{source} takes cannot be made by a view ({type(processor).__name__}): {error}; "
                "register the model in a plug-in (--plugin), with a view of your own, or with inputs=."
            ) from error
    return _FITTED[key]


register_family(
    "hf", resolve, "vision models of transformers in a folder or in the Hugging Face cache, e.g. hf/./dinov2"
)
