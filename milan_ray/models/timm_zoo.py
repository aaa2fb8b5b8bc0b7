"""timm's models, as ``timm/NAME`` (``timm/vit_small_patch14_reg4_dinov2.lvd142m``); timm itself is optional.

Names are looked up when they are asked for, so nothing of timm is imported before.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.processors import agrees
from milan_ray.models.registry import OUTPUTS, RANDOM, TOKEN_BATCH, ModelSpec, register_family
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import WeightsFile, load_weights


def resolve(name: str) -> ModelSpec:
    """Describes one of timm's models: preprocessing from its data config, prefix tokens from the model.

    Dissected by default are, in transformers, the MLPs' hidden units before the activation, else the stages that timm
    lists as features.

    Args:
        name: timm's name, with or without the tag of its weights.

    Raises:
        MilanError: timm is not installed, has no such model, or crops images in a way that a view has not.
    """
    timm = _timm()
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no weights of that tag
        config = None
    if config is None:
        raise unknown_name("timm model", name, timm.list_models(pretrained=True))
    model = _structure(timm, name)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        layers = [info["module"] for info in getattr(model, "feature_info", ())]
    else:
        layers = [path for path, _ in model.named_modules() if path.endswith("mlp.fc1")]
    return ModelSpec(
        f"timm/{name}",
        partial(build, name),
        tuple(dict.fromkeys(layers)) or (OUTPUTS,),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _timm().create_model(name, pretrained=False)
    if weights is not None and weights != RANDOM:
        load_weights(model, weights)
    return model


def _structure(timm: ModuleType, name: str) -> nn.Module:
    """A model without weights, for its layers' names."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except RuntimeError:  # versions up to 1.0.20 at least read numbers off tensors while they build some networks
        return build(name, None)


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MilanError("models named timm/… come with timm, which is not installed: `pip install timm`.") from error


_CHECKED: dict[str, Preprocess] = {}


def _preprocess(timm: ModuleType, name: str, config: dict[str, Any]) -> Preprocess:
    """The view and normalisation of a data configuration, checked against timm's own transforms on test pictures.

    Raises:
        MilanError: There are none.
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
