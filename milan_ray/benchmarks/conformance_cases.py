"""Families checked by :mod:`milan_ray.benchmarks.conformance`, each with its smallest network, untrained."""

from __future__ import annotations

import inspect
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from milan_ray.benchmarks.conformance import MOST_PARAMETERS, Case
from milan_ray.benchmarks.conformance_truth import Subject
from milan_ray.errors import MilanError
from milan_ray.models import timm_zoo
from milan_ray.models.folders import import_transformers
from milan_ray.models.registry import OUTPUTS, RANDOM, ModelSpec, get_model
from milan_ray.models.view import Preprocess, View

LIBRARIES = ("torchvision", "timm", "transformers")

_SIDE = 256  # pixels, for networks that accept any size and have a larger default


def cases(library: str | None = None, families: str = "*", side: int | None = None) -> Iterator[Case]:
    """Yields the families of the installed libraries.

    Args:
        library: One of :data:`LIBRARIES`; None for all of them.
        families: Pattern of family names.
        side: Height and width in pixels for networks that accept any size; None uses the network's own, at most 256.
    """
    for name, listed in zip(LIBRARIES, (_torchvision, _timm, _transformers), strict=True):
        if library in (None, name):
            yield from (case for case in listed(side) if fnmatchcase(case.family, families))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def _square(spec: ModelSpec, side: int) -> ModelSpec:
    preprocess = spec.preprocess
    return replace(spec, preprocess=Preprocess(View((side, side), None), preprocess.mean, preprocess.std))


# torchvision ------------------------------------------------------------------------------------------------------

_CLASSIFIERS = (
    "convnext", "densenet", "efficientnet_v2", "efficientnet", "maxvit", "mnasnet", "mobilenet_v2", "mobilenet_v3",
    "regnet_x", "regnet_y", "resnet", "resnext", "shufflenet_v2", "squeezenet", "swin_v2", "swin", "vgg*_bn", "vgg",
    "vit", "wide_resnet",
)  # fmt: skip
_ANY_SIZE = "convnext*|densenet*|efficientnet*|mnasnet*|mobilenet*|regnet*|res*|wide*|shufflenet*|squeezenet*|vgg*"
_EXTRA = {
    "convnext": ("features.1.0.block.0", "features.1.0.block.2", "features.1.0.block.3"),
    "swin": ("features.1.0", "features.2", "features.3.0"),
    "swin_v2": ("features.1.0", "features.2", "features.3.0"),
    "vit": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
    "densenet": ("features.transition1",),
}
"""Layers to compare in addition to the default ones, because their axes are in another order."""


def _torchvision(side: int | None) -> Iterator[Case]:
    smallest: dict[str, tuple[int, str]] = {}
    for name in models.list_models(module=models):
        family = next((part for part in _CLASSIFIERS if fnmatchcase(name, f"{part}*")), name)
        size = int(models.get_model_weights(name).DEFAULT.meta["num_params"])
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    for family, (_, name) in smallest.items():
        free = any(fnmatchcase(name, part) for part in _ANY_SIZE.split("|"))
        yield Case("torchvision", family, name, partial(_classifier, family, name, side if free else None))
    for name in models.list_models(module=models.segmentation):
        if not name.endswith("101"):
            yield Case("torchvision", f"segmentation/{name}", name, partial(_part, name, "backbone.", side))
    for name in models.list_models(module=models.detection):
        yield Case("torchvision", f"detection/{name}", name, partial(_part, name, "", side))


def _classifier(family: str, name: str, side: int | None) -> Subject:
    spec = get_model(f"{name}/imagenet")
    spec = replace(spec, published={}, weights=RANDOM)
    if side is not None:
        spec = _square(spec, side)
    network = spec.load()
    layers = (*(spec.layers if family != "vit" else ()), *_EXTRA.get(family, ()))  # the extractor treats MLPs as leaves
    return Subject(spec, network, partial(_extracted, family, spec, network, layers))


def _part(name: str, inside: str, side: int | None) -> Subject:
    """Builds a segmentation network, or a detector's backbone, as a plug-in would register it."""
    whole = _seeded(lambda: models.get_model(name, weights=None, weights_backbone=None))
    network = whole if inside else whole.get_submodule("backbone")
    layers: list[str] = []
    for path, child in network.named_children():
        if path.startswith(("backbone", "body", "features")):
            layers += [f"{path}.{part}" for part, stage in child.named_children() if _parameters(stage)]
        elif path == "classifier":
            layers.append(path)
    side = 300 if name.startswith("ssd300") else side or 192
    spec = ModelSpec(name, lambda weights: network, tuple(layers), Preprocess(View((side, side), None)))
    return Subject(spec, network, partial(_extracted, "", spec, network, spec.layers))


def _extracted(
    family: str, spec: ModelSpec, network: nn.Module, layers: tuple[str, ...], views: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Computes layers' maps with torchvision's feature extractor; the order of axes follows each family's source."""
    nodes = {layer: layer for layer in layers}
    last = get_graph_node_names(network)[1][-1]  # runs the whole network, including in-place functions
    extractor = create_feature_extractor(network, {**nodes, last: OUTPUTS})
    outputs = extractor(spec.prepare(views))
    return {layer: _as_maps(family, layer, outputs[layer]) for layer in layers}


def _as_maps(family: str, layer: str, output: torch.Tensor) -> torch.Tensor:
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim == 3:  # ViT: a class token, then the patches row by row
        return _grid(output[:, 1:])
    last = family.startswith("swin") or (family == "convnext" and re.search(r"\.block\.[1-5]$", layer))
    return output.permute(0, 3, 1, 2) if last else output


def _grid(tokens: torch.Tensor) -> torch.Tensor:
    """Converts tokens (n, h·w, U) of a square image, row by row, to maps."""
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))


# timm -------------------------------------------------------------------------------------------------------------

_SMALLEST = (
    "beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c",
    "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "test_efficientnet",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b",
    "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0",
    "test_mambaout", "test_coatnet", "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050",
    "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "nest_tiny", "nextvit_small", "test_nfnet", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "test_resnet",
    "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small",
    "vgg11", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos",
    "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception",
    "xception41p", "xcit_nano_12_p8_224",
)  # fmt: skip
"""The smallest network of each of timm's modules; where a module has none of these, it is searched for."""


_IN_BLOCKS = ("byoanet",)
"""Families that keep their default size, because all their maps must divide into whole blocks."""


def _signature(name: str) -> set[str]:
    """Returns the parameters of a network's constructor."""
    return set(inspect.signature(type(timm_zoo.structure(name)).__init__).parameters)


def _timm(side: int | None) -> Iterator[Case]:
    try:
        timm = timm_zoo.import_timm()
    except MilanError:
        return
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        known = [name for name in names if name in _SMALLEST]
        name = known[0] if known else min(names, key=lambda name: _parameters(timm_zoo.structure(name)))
        yield Case("timm", family, name, partial(_timm_subject, family, name, side))


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _timm_subject(family: str, name: str, side: int | None) -> Subject:
    timm = timm_zoo.import_timm()
    spec = get_model(f"timm/{name}")
    spec = replace(spec, published={}, weights=RANDOM)
    options: dict[str, Any] = {}
    if _parameters(timm_zoo.structure(name)) > MOST_PARAMETERS:
        options["depth"] = 2
    if not timm.get_pretrained_cfg(name).fixed_input_size:
        wanted = min(_SIDE, *spec.preprocess.view.shape) if side is None or family in _IN_BLOCKS else side
        if wanted != spec.preprocess.view.shape[0]:
            spec = _square(spec, wanted)
            if "img_size" in _signature(name):
                options["img_size"] = wanted
    if options:
        network = _seeded(lambda: timm.create_model(name, pretrained=False, **options))
        spec = replace(spec, layers=timm_zoo.default_layers(network), factory=lambda weights: network)
    else:
        network = spec.load()
    return Subject(spec, network, partial(_intermediates, spec, network))


def _intermediates(spec: ModelSpec, network: Any, views: torch.Tensor) -> list[torch.Tensor]:
    return list(network.forward_intermediates(spec.prepare(views), output_fmt="NCHW", intermediates_only=True))


# transformers -----------------------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_VIT: dict[str, Any] = {**_TINY, "intermediate_size": 48, "image_size": 64, "patch_size": 8}
_STAGES: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "patch_size": 4}
_DINO: dict[str, Any] = {**_TINY, "mlp_ratio": 2, "image_size": 64, "patch_size": 8}
_MOBILE: dict[str, Any] = {"depth_multiplier": 0.25, "image_size": 64, "min_depth": 8, "initializer_range": 0.1}
_PYRAMID: dict[str, Any] = {
    "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip
_CONVOLUTIONS: dict[str, Any] = {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]}

MAPS, LAST, RESHAPED, RESHAPED_LAST = "maps", "last", "reshaped", "reshaped, units last"

_ARCHITECTURES: dict[str, tuple[dict[str, Any], int | str]] = {
    "Aimv2Vision": (_VIT, 0),
    "Beit": ({**_VIT, "use_relative_position_bias": True}, 1),
    "Bit": ({"embedding_size": 16, **_CONVOLUTIONS, "num_groups": 4}, MAPS),
    "CLIPVision": (_VIT, 1),
    "ChineseCLIPVision": (_VIT, 1),
    "ConvNext": ({"num_stages": 3, **_CONVOLUTIONS, "image_size": 64}, MAPS),
    "ConvNextV2": ({"num_stages": 3, **_CONVOLUTIONS, "image_size": 64}, MAPS),
    "Cvt": ({"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, MAPS),
    "DINOv3ConvNext": ({**_CONVOLUTIONS, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, MAPS),
    "DINOv3ViT": ({**_VIT, "num_register_tokens": 4}, 5),
    "DPT": ({**_VIT, "backbone_out_indices": [0, 1, 2, 2], "neck_hidden_sizes": [8, 8, 8, 8]}, 1),
    "Data2VecVision": ({**_VIT, "use_relative_position_bias": True}, 1),
    "DeiT": (_VIT, 2),
    "Dinov2": (_DINO, 1),
    "Dinov2WithRegisters": ({**_DINO, "num_register_tokens": 3}, 4),
    "DonutSwin": ({**_STAGES, "window_size": 4}, RESHAPED),
    "EfficientNet": (
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "image_size": 64,
            "hidden_dim": 320,
            "initializer_range": 0.1,
        },
        MAPS,
    ),
    "FocalNet": (
        {
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "image_size": 64,
        },
        RESHAPED,
    ),
    "GLPN": ({**_PYRAMID, "decoder_hidden_size": 16}, MAPS),
    "HGNetV2": (
        {
            "initializer_range": 0.1,
            "embedding_size": 16,
            "stem_channels": [3, 8, 16],
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 24, 32, 40],
            "stage_in_channels": [16, 16, 24, 32],
            "stage_mid_channels": [8, 8, 12, 16],
            "stage_out_channels": [16, 24, 32, 40],
            "stage_num_blocks": [1, 1, 1, 1],
        },
        MAPS,
    ),
    "Hiera": (
        {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 2, 1], "num_heads": [1, 2, 4], "num_query_pool": 2},
        RESHAPED_LAST,
    ),
    "IJepa": (_VIT, 0),
    "InternVLVision": (_VIT, 1),
    "Levit": (
        {
            "image_size": 224,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
            "initializer_range": 0.1,  # with .02, networks this narrow give the same output for all images
        },
        0,
    ),
    "MLCDVision": (_VIT, 1),
    "MobileNetV1": (_MOBILE, MAPS),
    "MobileNetV2": (_MOBILE, MAPS),
    "MobileViT": (
        {
            "initializer_range": 0.1,
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 2,
        },
        MAPS,
    ),
    "MobileViTV2": ({"image_size": 64, "width_multiplier": 0.25, "initializer_range": 0.1}, MAPS),
    "Pixio": ({**_DINO, "n_cls_tokens": 2}, 2),
    "PoolFormer": ({"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}, MAPS),
    "Pvt": ({**_PYRAMID, "image_size": 64}, 0),
    "PvtV2": ({**_PYRAMID, "image_size": 64}, MAPS),
    "RegNet": ({"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "groups_width": 8}, MAPS),
    "ResNet": ({"embedding_size": 8, **_CONVOLUTIONS}, MAPS),
    "SamVision": (
        {**_VIT, "output_channels": 16, "window_size": 4, "global_attn_indexes": [2], "initializer_range": 0.1},
        LAST,
    ),
    "Segformer": ({**_PYRAMID, "decoder_hidden_size": 16}, MAPS),
    "SiglipVision": (_VIT, 0),
    "SwiftFormer": ({"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 40]}, MAPS),
    "Swin": ({**_STAGES, "window_size": 4}, RESHAPED),
    "Swin2SR": ({"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8}, 0),
    "Swinv2": ({**_STAGES, "window_size": 4}, RESHAPED),
    "TextNet": ({"image_size": [64, 64], "stem_out_channels": 16, "hidden_sizes": [16, 16, 24, 32, 40]}, MAPS),
    "ViT": (_VIT, 1),
    "ViTMAE": (_VIT, 1),
    "ViTMSN": (_VIT, 1),
    "VitDet": ({**_TINY, "image_size": 64, "patch_size": 8, "window_size": 4, "window_block_indices": [0, 2]}, MAPS),
    "Yolos": ({**_VIT, "image_size": [64, 64], "num_detection_tokens": 5}, 1),
}
"""Architecture → its tiny configuration, and the format of ``output_hidden_states``.

The format is the number of tokens before the patches, or :data:`MAPS` (n, U, h, w), :data:`LAST` (n, h, w, U), or
``reshaped_hidden_states`` of these kinds."""


def _transformers(side: int | None) -> Iterator[Case]:
    try:
        transformers = import_transformers()
    except MilanError:
        return
    for name in _ARCHITECTURES:
        if hasattr(transformers, f"{name}Config"):
            yield Case("transformers", name, f"tiny {name}", partial(_tiny, name))


def _tiny(name: str) -> Subject:
    """Saves a network and its processor to a folder, as users do, and resolves the folder."""
    transformers = import_transformers()
    options, layout = _ARCHITECTURES[name]
    size = options.get("image_size", 64)
    height, width = size if isinstance(size, list) else (size, size)
    config = getattr(transformers, f"{name}Config")(**options)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = _seeded(lambda: transformers.AutoModel.from_config(config))
        model.save_pretrained(folder)
        processor = transformers.ViTImageProcessor(size={"height": height, "width": width})
        processor.save_pretrained(folder)
        spec = get_model(f"hf/{folder}")
        network = spec.load()
    spec = replace(spec, name=f"hf/tiny-{name}")
    return Subject(spec, network, partial(_hidden_states, spec, network, layout))


def _hidden_states(spec: ModelSpec, network: nn.Module, layout: int | str, views: torch.Tensor) -> list[torch.Tensor]:
    prepared = spec.prepare(views)
    assert isinstance(prepared, dict)
    outputs = network(**prepared, output_hidden_states=True)
    states = outputs.reshaped_hidden_states if layout in (RESHAPED, RESHAPED_LAST) else outputs.hidden_states
    if layout in (MAPS, RESHAPED):
        return list(states)
    if layout in (LAST, RESHAPED_LAST):
        return [state.permute(0, 3, 1, 2) for state in states]
    assert isinstance(layout, int)
    maps = []
    for state in states:
        patches = math.isqrt(state.shape[1] - layout) ** 2  # in YOLOS, a few detection tokens follow
        start = layout or state.shape[1] - patches  # PVT has a class token only in its last stage
        maps.append(_grid(state[:, start : start + patches]))
    return maps
