"""Models of timm, named ``timm/NAME`` (``timm/vit_small_patch14_reg4_dinov2.lvd142m``); timm itself is optional.

timm is imported only when such a name is looked up.
"""

from __future__ import annotations

import math
import re
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from milan_ray.device import without_weights
from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.blocks import blocks, running
from milan_ray.models.folders import import_optional
from milan_ray.models.processors import agrees
from milan_ray.models.registry import OUTPUTS, TOKEN_BATCH, ModelSpec, build_seeded, register_family
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import WeightsFile

_NO_PATCHES = re.compile(r"blocks_token_only|cls_attn|rel_pos")
"""MLPs of class tokens and of position tables: their outputs do not belong to places in the image."""


def resolve(name: str) -> ModelSpec:
    """Describes one of timm's models: preprocessing from its data config, prefix tokens from the model.

    The default layers are the MLPs' hidden units before the activation in transformers, and the stages that timm lists
    as features in other networks; see :func:`default_layers`.

    Args:
        name: timm's name, with or without the tag of its weights.

    Raises:
        MilanError: timm is not installed, has no such model, or crops images in a way that a view cannot.
    """
    timm = import_timm()
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no weights of that tag
        config = None
    if config is None:
        raise unknown_name("timm model", name, timm.list_models(pretrained=True))
    model = structure(name)
    prefix = getattr(model, "num_prefix_tokens", None)
    return ModelSpec(
        f"timm/{name}",
        partial(build, name),
        default_layers(model),
        _preprocess(timm, name, timm.data.resolve_data_config(pretrained_cfg=config.to_dict())),
        prefix_tokens=prefix,
        channels_last=".*" if getattr(model, "output_fmt", "NCHW") == "NHWC" else None,
        max_batch=None if prefix is None else TOKEN_BATCH,
        published=_published(config),
    )


def build(name: str, weights: str | None) -> nn.Module:
    """Builds one of timm's models with weights from a file, or untrained ones from seed 0.

    Raises:
        MilanError: timm is not installed, or the file does not fit.
    """
    return build_seeded(partial(import_timm().create_model, name, pretrained=False), weights)


def default_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers of one of timm's networks that are dissected by default.

    In transformers with tokens before the patches, these are the hidden units of the MLPs. Where there are none (gated
    MLPs), and in other networks, these are the modules that timm lists as features. Where none of them runs, these are
    the network's blocks.

    Args:
        model: The network; weights are not needed.
    """
    modules = dict(model.named_modules())
    layers: tuple[str, ...] = ()
    if getattr(model, "num_prefix_tokens", None) is not None:
        layers = tuple(path for path in modules if path.endswith("mlp.fc1") and not _NO_PATCHES.search(path))
    if not layers:
        layers = running(model, [info.get("module", "") for info in getattr(model, "feature_info", None) or ()])
    return layers or blocks(model) or (OUTPUTS,)


def structure(name: str) -> nn.Module:
    """One of timm's networks without weights, for its layers' names."""
    try:
        with without_weights():
            return import_timm().create_model(name, pretrained=False)
    except RuntimeError:  # versions up to 1.0.20 at least read numbers off tensors while they build some networks
        return build(name, None)


def import_timm() -> ModuleType:
    """The package timm.

    Raises:
        MilanError: It is not installed.
    """
    return import_optional("timm", "models named timm/… come")


_CHECKED: dict[str, Preprocess] = {}


def _preprocess(timm: ModuleType, name: str, config: dict[str, Any]) -> Preprocess:
    """The view and normalisation of a data configuration, checked against timm's own transforms on test pictures.

    Raises:
        MilanError: No view reproduces the transforms.
    """
    key = repr(sorted(config.items()))
    if key in _CHECKED:
        return _CHECKED[key]
    channels, height, width = config["input_size"]
    refused = MilanError(
        f"timm/{name} takes {channels}×{height}×{width} images with crop mode {config['crop_mode']!r}, which a view "
        "cannot make: register it in a plug-in (--plugin), with a view of your own, or with inputs=."
    )
    if channels != 3 or len(config["mean"]) != 3 or len(config["std"]) != 3:
        raise refused
    resize = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    crop = height if height == width else (height, width)
    squash = config["crop_mode"] == "squash"
    if not squash and height != width:
        raise refused
    preprocess = Preprocess(
        View((resize[0], resize[1]) if squash else resize[0], crop, config["interpolation"]),
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    transform = timm.data.create_transform(**config)

    def process(image: Image.Image) -> np.ndarray:
        return np.asarray(transform(image), np.float32)

    if not agrees(process, preprocess):
        raise refused
    return _CHECKED.setdefault(key, preprocess)


def _published(config: Any) -> dict[str, WeightsFile]:
    if config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        return {config.tag: WeightsFile(f"{config.hf_hub_id.rsplit('/', 1)[-1]}.safetensors", url)}
    return {config.tag: WeightsFile.at(config.url)} if config.url else {}


register_family("timm", resolve, "timm's models by name, e.g. timm/resnet50.a1_in1k (needs timm)")
