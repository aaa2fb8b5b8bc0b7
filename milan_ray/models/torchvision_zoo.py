"""Every classifier of torchvision, registered as ``<architecture>/imagenet``.

A plug-in like a user's own: importing it registers. No model is built for that.
"""

from __future__ import annotations

import fnmatch
import re
import urllib.error
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from milan_ray.config import models_dir
from milan_ray.errors import MilanError
from milan_ray.models.registry import OUTPUTS, RANDOM, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import load_strictly, read_state_dict


def _paths(prefix: str, *names: int | str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names)


def _features(*indices: int) -> tuple[str, ...]:
    return _paths("features.", *indices)


def _mlps(blocks: int) -> tuple[str, ...]:
    return tuple(f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(blocks))


# The reference's lists (REFERENCE §1.6) as far as it has them; for ViTs, as there, the MLPs' hidden units before the
# GELU; else stem and stages. The first match counts.
_LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("alexnet", _features(0, 3, 6, 8, 10)),
    ("*resne[tx]*", ("conv1", *_paths("layer", 1, 2, 3, 4))),
    ("densenet*", ("features.conv0", *_paths("features.denseblock", 1, 2, 3, 4))),
    ("mobilenet_v2", _features(*range(0, 20, 2))),
    ("shufflenet*", ("conv1", *_paths("stage", 2, 3, 4), "conv5")),
    ("squeezenet1_0", _features(0, 3, 4, 5, 7, 8, 9, 10, 12)),
    ("squeezenet1_1", _features(0, 3, 4, 6, 7, 9, 10, 11, 12)),
    ("vgg11", _features(0, 3, 8, 13, 18)),
    ("vgg13", _features(2, 7, 12, 17, 22)),
    ("vgg16", _features(2, 7, 14, 21, 28)),
    ("vgg19", _features(2, 7, 16, 25, 34)),
    ("vgg11_bn", _features(0, 4, 11, 18, 25)),
    ("vgg13_bn", _features(3, 10, 17, 24, 31)),
    ("vgg16_bn", _features(3, 10, 20, 30, 40)),
    ("vgg19_bn", _features(3, 10, 23, 36, 49)),
    ("convnext*", _features(1, 3, 5, 7)),
    ("swin*", _features(1, 3, 5, 7)),
    ("efficientnet_v2_s", _features(*range(8))),
    ("efficientnet*", _features(*range(9))),
    ("mobilenet_v3_small", _features(*range(13))),
    ("mobilenet_v3_large", _features(*range(17))),
    ("mnasnet*", _paths("layers.", 0, 3, 6, *range(8, 15))),
    ("regnet*", ("stem", *_paths("trunk_output.block", 1, 2, 3, 4))),
    ("maxvit*", ("stem", *_paths("blocks.", 0, 1, 2, 3))),
    (
        "googlenet",
        (*_paths("conv", 1, 2, 3), *_paths("inception", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")),
    ),
    (
        "inception_v3",
        (
            *_paths("Conv2d_", "1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"),
            *_paths("Mixed_", "5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"),
        ),
    ),
    ("vit_b_*", _mlps(12)),
    ("vit_l_*", _mlps(24)),
    ("vit_h_*", _mlps(32)),
)

_CHANNELS_LAST = {"swin": r"features\..*|norm", "convnext": r".*\.block\.[1-5]"}


def default_layers(architecture: str) -> tuple[str, ...]:
    """The layers dissected by default; the model's outputs for an architecture that this version does not know."""
    return next((layers for pattern, layers in _LAYERS if fnmatch.fnmatchcase(architecture, pattern)), (OUTPUTS,))


def find_weights(architecture: str, download: bool = False) -> str:
    """Finds torchvision's own weights file of an architecture.

    Looked for in torch.hub's checkpoint directory and in ``MILAN_MODELS_DIR`` (default ``./models``).

    Args:
        architecture: torchvision's name of it.
        download: Whether to fetch an absent file, into torch.hub's checkpoint directory.

    Returns:
        The file's absolute path.

    Raises:
        MilanError: The file is absent, or the download failed.
    """
    url = models.get_model_weights(architecture).DEFAULT.url
    file = url.rsplit("/", 1)[-1]
    hub = Path(torch.hub.get_dir(), "checkpoints")
    own = models_dir()
    for folder in (hub, own):
        if (folder / file).is_file():
            return str((folder / file).resolve())
    if not download:
        raise MilanError(
            f"no weights for {architecture}/imagenet: {file} is neither in {hub} nor in {own}; fetch it from "
            f"{url} into one of them, let --download fetch it, or name a file of your own with --weights."
        )
    return _download(url, hub / file)


def _download(url: str, target: Path) -> str:
    expected = re.search(r"-([0-9a-f]{8,})\.", target.name)  # torchvision's files carry the start of their sha256
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), expected.group(1) if expected else None, progress=True)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise MilanError(f"cannot download {url} to {target} ({error}): fetch it there by other means.") from error
    return str(target.resolve())


def build(architecture: str, weights: str | None = None) -> nn.Module:
    """Builds a torchvision classifier with its weights.

    The number of classes follows the file's head. Construction leaves torch's random state as it was.

    Args:
        architecture: torchvision's name of it.
        weights: Path of a weights file, ``random`` for untrained ones from seed 0, or None for torchvision's own file.

    Raises:
        MilanError: There is no such file, or it does not fit.
    """
    options: dict[str, object] = {}
    if architecture.startswith("vit_"):
        options["image_size"] = models.get_model_weights(architecture).DEFAULT.transforms().crop_size[0]
    if architecture in ("googlenet", "inception_v3"):
        # The published weights are ported ones that expect inputs in [-1, 1] and have no use for the auxiliary heads.
        options.update(transform_input=True, aux_logits=False, init_weights=weights == RANDOM)
    if weights == RANDOM:
        return _construct(architecture, options)
    path = weights or find_weights(architecture)
    state = read_state_dict(path)
    if "aux_logits" in options:
        state = {name: tensor for name, tensor in state.items() if not name.lower().startswith("aux")}
    model = _construct(architecture, options)
    head, weight = [(name, p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1][-1]
    classes = len(state[head]) if head in state and state[head].ndim else len(weight)
    if classes != len(weight):
        model = _construct(architecture, {**options, "num_classes": classes})
    load_strictly(model, state, path)
    return model


def _construct(architecture: str, options: dict[str, object]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.get_model(architecture, weights=None, **options)


def register(architectures: Iterable[str] = ()) -> None:
    """Registers classifiers of torchvision, all of them when none is named."""
    for name in architectures or models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        recipe = weights.transforms()
        view = View(resize=recipe.resize_size[0], crop=recipe.crop_size[0], interpolation=recipe.interpolation.value)
        family = name.split("_")[0]
        register_model(
            f"{name}/imagenet",
            partial(build, name),
            default_layers(name),
            Preprocess(view, tuple(recipe.mean), tuple(recipe.std)),
            prefix_tokens=1 if family == "vit" else None,
            channels_last=_CHANNELS_LAST.get(family),
            find_weights=partial(find_weights, name),
            classes=tuple(weights.meta["categories"]),
        )


register()
