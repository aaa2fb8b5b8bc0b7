"""Vision models of transformers, as ``hf/FOLDER`` or ``hf/ID``; transformers itself is optional.

Nothing is fetched: a model is a folder that ``save_pretrained`` wrote, or lies in the Hugging Face cache.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import nn

from milan_ray.errors import MilanError, reason
from milan_ray.models.blocks import blocks
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import OUTPUTS, RANDOM, TOKEN_BATCH, ModelSpec, register_family
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import read_state_dict

_MLP = re.compile(r".*\.(mlp\.fc1|intermediate\.dense|mlp\.up_proj)")
_STAGE = re.compile(r"(.*\.)?stages\.\d+")
# Unless told not to, transformers asks on the terminal whether to run the code that comes with a model.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def resolve(source: str) -> ModelSpec:
    """Describes a vision model: preprocessing from its image processor, prefix tokens from its patches.

    Dissected by default are, in transformers, the MLPs' hidden units before the activation, else the stages, else
    the blocks. Of a model of images and text it is the image tower.

    Args:
        source: Folder of the model, or its id in the Hugging Face cache.

    Raises:
        MilanError: transformers is not installed, there is no such model, or a view cannot make its inputs.
    """
    transformers = import_transformers()
    source = str(Path(source).expanduser().absolute()) if Path(source).expanduser().is_dir() else source
    try:
        config = transformers.AutoConfig.from_pretrained(source, **_LOCAL)
        processor = transformers.AutoImageProcessor.from_pretrained(source, **_LOCAL)
    except (OSError, ValueError) as error:
        raise MilanError(
            f"hf/{source} is neither a folder with a vision model's config.json, model.safetensors and "
            f"preprocessor_config.json nor in the Hugging Face cache ({reason(error)}): give such a "
            f"folder, or run `hf download {source}`."
        ) from error
    preprocess = _preprocess(source, processor.to_dict())
    inputs = partial(_pixel_values, preprocess)
    with torch.device("meta"):
        model = _vision(transformers.AutoModel.from_config(config)).eval()
    paths = [path for path, _ in model.named_modules()]
    mlps = tuple(filter(_MLP.fullmatch, paths))
    if mlps and not _rows_are_images(model, mlps[0], preprocess):
        mlps = ()
    return ModelSpec(
        f"hf/{source}",
        partial(build, source),
        mlps or tuple(filter(_STAGE.fullmatch, paths)) or blocks(model) or (OUTPUTS,),
        preprocess,
        inputs,
        prefix_tokens=_prefix_tokens(model, mlps[0], preprocess) if mlps else None,
        max_batch=TOKEN_BATCH if mlps else None,
    )


def build(source: str, weights: str | None) -> nn.Module:
    """Builds a model with its own weights, those of a file, or untrained ones from seed 0.

    Raises:
        MilanError: Weights are missing or do not fit.
    """
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(source, **_LOCAL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # also for a pooler that was not saved; nothing that is dissected depends on it
        if weights == RANDOM:
            return _vision(transformers.AutoModel.from_config(config)).float()
        with torch.device("meta"):
            kind = type(transformers.AutoModel.from_config(config))
        state = None if weights is None else read_state_dict(weights)
        try:
            model, report = kind.from_pretrained(
                source if weights is None else None,
                config=config,
                state_dict=state,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers' readers raise on absent, damaged or unfit files
            raise MilanError(
                f"the weights in {weights or source} cannot be loaded ({reason(error)}): save the model again."
            ) from error
    missing = [name for name in sorted(report["missing_keys"]) if "pooler." not in name]
    if missing:
        raise MilanError(
            f"the weights in {weights or source} lack {missing[0]} and {len(missing) - 1} more of {source}."
        )
    return _vision(model).float()


def import_transformers(what: str = "models named hf/… come") -> ModuleType:
    """The package transformers, without its progress bars.

    Raises:
        MilanError: It is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MilanError(f"{what} with transformers, which is not installed: `pip install transformers`.") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _vision(model: nn.Module) -> nn.Module:
    return model.get_submodule("vision_model") if hasattr(model, "vision_model") else model


def _pixel_values(preprocess: Preprocess, views: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": preprocess(views)}


def _rows_are_images(model: nn.Module, layer: str, preprocess: Preprocess) -> bool:
    """Whether a layer puts out one row per image, not one per window or per pixel of a patch (MobileViT)."""
    if not isinstance(getattr(model.config, "patch_size", None), int):
        return True
    height, width = preprocess.view.shape
    with LayerTap(model, [layer]) as tap, torch.no_grad():
        return len(tap({"pixel_values": torch.zeros(1, 3, height, width, device="meta")})[layer]) == 1


def _prefix_tokens(model: nn.Module, layer: str, preprocess: Preprocess) -> int | None:
    """CLS and register tokens: what a layer has besides one token per patch. None when there are no patches."""
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int):
        return None
    height, width = preprocess.view.shape
    with LayerTap(model, [layer]) as tap, torch.no_grad():
        tokens = tap({"pixel_values": torch.zeros(1, 3, height, width, device="meta")})[layer]
    return tokens.shape[1] - (height // patch) * (width // patch) if tokens.ndim == 3 else None


def _preprocess(source: str, processor: Mapping[str, Any]) -> Preprocess:
    """The view and normalisation of an image processor.

    Raises:
        MilanError: Its images vary in size, or are no square crops, or are scaled otherwise than to [0, 1].
    """
    size, crop = processor.get("size") or {}, None
    resize: int | tuple[int, int] | None = size.get("shortest_edge")
    if size.get("height"):
        resize = (size["height"], size["width"])
    if processor.get("do_center_crop"):
        crop = processor["crop_size"]["height"]
    elif processor.get("crop_pct") and isinstance(resize, int):  # ConvNeXt's
        resize, crop = (
            (math.floor(resize / processor["crop_pct"]), resize) if resize < 384 else ((resize, resize), None)
        )
    scaled = math.isclose(processor.get("rescale_factor", 1 / 255), 1 / 255)
    if not processor.get("do_resize", True):
        resize = None
    if not scaled or (crop is None and not isinstance(resize, tuple)):
        raise MilanError(
            f"the images that hf/{source} takes have no fixed size or scale (size {size}, crop {crop}): register it in "
            "a plug-in with a view of your own."
        )
    view = View(resize, crop, Image.Resampling(processor.get("resample", 2)).name.lower())
    if not processor.get("do_normalize", True):
        return Preprocess(view, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Preprocess(view, tuple(processor["image_mean"]), tuple(processor["image_std"]))


register_family(
    "hf", resolve, "vision models of transformers in a folder or in the Hugging Face cache, e.g. hf/./dinov2"
)
