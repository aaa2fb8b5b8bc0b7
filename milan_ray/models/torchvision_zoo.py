"""Every classifier of torchvision, registered as ``<architecture>/imagenet``; some also as ``…/imagenet-blurred``.

Works like a user's plug-in: importing the module registers the models, without building any.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torchvision import models

from milan_ray.models.registry import OUTPUTS, RANDOM, TOKEN_BATCH, build_seeded, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import WeightsFile, load_strictly, read_weights


def _paths(prefix: str, *names: int | str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names)


def _features(*indices: int) -> tuple[str, ...]:
    return _paths("features.", *indices)


def _mlps(blocks: int) -> tuple[str, ...]:
    return tuple(f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(blocks))


# The reference's layers where it lists any. For ViTs, as in the reference, these are the MLPs' hidden units before the
# GELU. For other architectures, these are stem and stages. The first matching pattern counts.
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

BLURRED = (
    "alexnet", "densenet121", "densenet201", "mobilenet_v2", "resnet18", "resnet34", "resnet50", "resnet101",
    "resnet152", "shufflenet_v2_x1_0", "squeezenet1_0", "vgg11", "vgg13", "vgg16", "vgg19",
)  # fmt: skip
"""Architectures for which the reference also has weights trained on ImageNet with blurred faces."""

_ALEXNET = (
    "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4", "relu4", "conv5", "relu5", "pool5",
    "avgpool", "flatten", "dropout6", "fc6", "relu6", "dropout7", "fc7", "relu7", "linear8",
)  # fmt: skip


def default_layers(architecture: str) -> tuple[str, ...]:
    """The layers dissected by default; the model's output for an architecture that matches no pattern."""
    return next((layers for pattern, layers in _LAYERS if fnmatch.fnmatchcase(architecture, pattern)), (OUTPUTS,))


def published_name(name: str) -> str:
    """Converts the name of a parameter in a published file to torchvision's.

    Old DenseNets have ``norm.1`` for ``norm1``; checkpoints of PyTorch's ImageNet example have the ``module.`` of data
    parallelism inside AlexNet and VGG.
    """
    name = re.sub(r"^features\.module\.", "features.", name)
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def build(
    architecture: str,
    weights: str | None,
    classes: int | None = None,
    rename: Callable[[str], str] = published_name,
    arrange: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Builds a torchvision classifier with its weights.

    The number of classes follows the file's head. Construction leaves torch's random state as it was.

    Args:
        architecture: Torchvision's name of the architecture.
        weights: Path of a weights file, or ``random`` for untrained ones from seed 0.
        classes: Number of classes without a file; None for ImageNet's.
        rename: Converts a name in the file to torchvision's.
        arrange: Restructures the loaded model.

    Raises:
        MilanError: There is no such file, or it does not fit.
    """
    options: dict[str, object] = {} if classes is None else {"num_classes": classes}
    if architecture in ("googlenet", "inception_v3"):
        # The published weights were ported: they expect inputs in [-1, 1] and do not use the auxiliary heads.
        options.update(transform_input=True, aux_logits=False, init_weights=weights == RANDOM)
    if architecture == "vit_h_14":
        options["image_size"] = 518  # the only size with published weights
    model = _construct(architecture, options)
    if weights is not None and weights != RANDOM:
        auxiliary = "aux_logits" in options
        state = read_weights(
            weights,
            model,
            rename=rename,
            needless=lambda name: auxiliary and name.lower().startswith("aux"),
            sizes=False,  # the head and the size of images follow the file's
            parts=True,
        )
        fitting = options | _sizes(architecture, model, state)
        if fitting != options:
            model = _construct(architecture, fitting)
        load_strictly(model, state, weights, parts=True)
    return arrange(model) if arrange else model


def _sizes(architecture: str, model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, object]:
    """Constructor arguments that give a model the sizes of given weights, where these differ from its own."""
    sizes: dict[str, object] = {}
    own = {name: tensor for name, tensor in model.state_dict().items() if name in state and tensor.ndim}
    head = [name for name, tensor in own.items() if name.endswith("weight") and tensor.ndim > 1][-1:]
    for name in head:
        if state[name].ndim and len(state[name]) != len(own[name]):
            sizes["num_classes"] = len(state[name])
    position = "encoder.pos_embedding"
    if position in own and state[position].shape != own[position].shape:
        patches = state[position].shape[1] - 1  # without the CLS token
        sizes["image_size"] = math.isqrt(patches) * int(architecture.rsplit("_", 1)[1])
    return sizes


def _construct(architecture: str, options: dict[str, object]) -> nn.Module:
    return build_seeded(partial(models.get_model, architecture, weights=None, **options), None)


def alexnet_by_name(model: models.AlexNet) -> nn.Sequential:
    """AlexNet as the chain of named modules whose layers the reference calls conv1 to conv5."""
    modules = (*model.features, model.avgpool, nn.Flatten(), *model.classifier)
    return nn.Sequential(OrderedDict(zip(_ALEXNET, modules, strict=True)))


def _published(architecture: str) -> dict[str, WeightsFile]:
    """Torchvision's weights by name; ``IMAGENET1K_V1``, which the reference uses, comes first where it exists."""
    files = {}
    for version in sorted(models.get_model_weights(architecture), key=lambda version: version.name != "IMAGENET1K_V1"):
        fingerprint = version.transforms()
        view = View(
            resize=fingerprint.resize_size[0],
            crop=fingerprint.crop_size[0],
            interpolation=fingerprint.interpolation.value,
        )
        preprocess = Preprocess(view, tuple(fingerprint.mean), tuple(fingerprint.std))
        files[version.name] = WeightsFile.at(version.url, preprocess=preprocess)
    return files


def register(architectures: Iterable[str] = ()) -> None:
    """Registers classifiers of torchvision, all of them when none is named."""
    for name in architectures or models.list_models(module=models):
        published = _published(name)
        family = name.split("_")[0]
        by_name = name == "alexnet"
        classes = tuple(models.get_model_weights(name).DEFAULT.meta["categories"])
        register_model(
            f"{name}/imagenet",
            partial(build, name, arrange=alexnet_by_name if by_name else None),
            _paths("conv", 1, 2, 3, 4, 5) if by_name else default_layers(name),
            next(iter(published.values())).preprocess,
            prefix_tokens=1 if family == "vit" else None,
            max_batch=TOKEN_BATCH if family == "vit" else None,
            channels_last=_CHANNELS_LAST.get(family),
            published=published,
            classes=classes,
        )
        if name in BLURRED:
            blurred = WeightsFile(f"{name}_imagenet-blurred.pth", also=(f"{name}/imagenet-blurred.pth",))
            register_model(
                f"{name}/imagenet-blurred",
                partial(build, name),
                default_layers(name),
                published={"BLURRED": blurred},
                classes=classes,
            )


register()
