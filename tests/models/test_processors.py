"""Inputs of named models are those of their libraries' own preprocessing, or the model is refused by one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from milan_ray.errors import MilanError
from milan_ray.models.hooks import LayerTap
from milan_ray.models.processors import fit, picture
from milan_ray.models.registry import ModelSpec, get_model
from milan_ray.models.resolve import resolve_model
from milan_ray.models.view import Preprocess, View
from milan_ray.plugins import load_plugins

load_plugins()

PICTURES = ((150, 207), (211, 96), (40, 57))


def inputs(spec: ModelSpec, image: Image.Image) -> torch.Tensor:
    """What a named model gets of a picture, as all jobs make it."""
    prepared = spec.prepare(torch.from_numpy(spec.preprocess.view(image).copy())[None])
    return prepared["pixel_values"] if isinstance(prepared, dict) else prepared  # type: ignore[return-value]


SQUARE: dict[str, Any] = {"size": {"height": 32, "width": 32}}
CROPPED: dict[str, Any] = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "LevitImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "PoolFormerImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "EfficientNetImageProcessor": SQUARE,
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}},
    "BeitImageProcessor": SQUARE,
    "MobileViTImageProcessor": CROPPED,
    "MobileNetV2ImageProcessor": CROPPED,
    "ViTImageProcessor": {**SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "DeiTImageProcessor": {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": CROPPED,
    "SiglipImageProcessor": SQUARE,
    "BitImageProcessor": CROPPED,
    "DINOv3ViTImageProcessor": SQUARE,
    "SegformerImageProcessor": SQUARE,
    "DPTImageProcessor": SQUARE,
    "PvtImageProcessor": {"size": {"height": 32, "width": 48}},
}


@pytest.fixture(scope="module")
def transformers() -> Iterator[object]:
    yield pytest.importorskip("transformers")


def save(folder: Path, transformers: object, kind: str, **settings: object) -> str:
    size = (32, 48) if kind == "PvtImageProcessor" else 32
    config = transformers.ViTConfig(  # type: ignore[attr-defined]
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=size, patch_size=8
    )
    config.save_pretrained(folder)
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    return f"hf/{folder}"


@pytest.mark.parametrize("kind", PROCESSORS)
def test_inputs_are_those_of_the_folders_own_processor(kind: str, transformers: object, tmp_path: Path) -> None:
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    spec = resolve_model(save(tmp_path, transformers, kind, **PROCESSORS[kind]))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    for size in PICTURES:
        image = picture(*size)
        expected = torch.as_tensor(np.asarray(processor(images=image, return_tensors="pt")["pixel_values"]))
        steps = (inputs(spec, image) - expected).abs() * min(spec.preprocess.std) * 255
        assert steps.max() <= 2.1 and steps.mean() <= 0.5, size
    assert get_model(f"hf/{tmp_path}").preprocess == spec.preprocess


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("PerceiverImageProcessor", {"size": {"height": 32, "width": 32}}, "no resizing and cropping"),
        ("SamImageProcessor", {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}, "no resizing"),
        ("CLIPImageProcessor", {**CROPPED, "size": {"shortest_edge": 32, "longest_edge": 50}}, "no resizing"),
        ("GLPNImageProcessor", {}, "no fixed size"),
        ("VideoMAEImageProcessor", {}, "no fixed size|more than a picture"),
        ("ImageGPTImageProcessor", {}, "more than a picture"),
    ],
)
def test_processors_that_no_view_equals_are_refused_by_name(
    kind: str, settings: dict[str, object], words: str, transformers: object, tmp_path: Path
) -> None:
    with pytest.raises(MilanError, match=rf"cannot be made by a view \({kind}.*({words}).*--plugin.*inputs=") as caught:
        resolve_model(save(tmp_path, transformers, kind, **settings))
    assert "\n" not in str(caught.value)


def test_masked_autoencoder_sees_all_patches_in_their_order(transformers: object, tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(  # type: ignore[attr-defined]
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=8
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    transformers.ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    spec = resolve_model(f"hf/{tmp_path}", layers=["embeddings", *get_model(f"hf/{tmp_path}").layers])
    model = spec.load()
    views = torch.from_numpy(np.stack([spec.preprocess.view(picture(*size)) for size in PICTURES]))
    with LayerTap(model, spec.layers) as tap, torch.inference_mode():
        first, again = tap(spec.prepare(views)), tap(spec.prepare(views[:1]))
        embeddings: Any = model.embeddings
        patches = embeddings.patch_embeddings(spec.preprocess(views)) + embeddings.position_embeddings[:, 1:]
    assert spec.prefix_tokens == 1
    torch.testing.assert_close(first["embeddings"][:, 1:], patches, rtol=0, atol=1e-6)
    for layer in spec.layers:
        torch.testing.assert_close(first[layer][:1], again[layer], rtol=0, atol=1e-5)


TIMM = (
    ("resnet18.a1_in1k", None),
    ("coatnet_0_rw_224.sw_in1k", None),
    ("swin_tiny_patch4_window7_224.ms_in1k", None),
    ("efficientnet_b0.ra_in1k", None),
    ("vit_base_patch16_sapiens2", "1024x768"),
    ("deepseek_vit_412m", "refused"),
)


@pytest.mark.parametrize(("name", "special"), TIMM)
def test_inputs_are_those_of_timms_own_transform(name: str, special: str | None) -> None:
    timm = pytest.importorskip("timm")
    from milan_ray.models.timm_zoo import _preprocess

    config = timm.get_pretrained_cfg(name)
    if config is None:
        pytest.skip(f"this version of timm has no {name}")
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    if special == "refused":
        with pytest.raises(MilanError, match="crop mode 'border', which a view cannot make"):
            _preprocess(timm, name, data)
        return
    preprocess, transform = _preprocess(timm, name, data), timm.data.create_transform(**data)
    for size in PICTURES:
        got = preprocess(torch.from_numpy(preprocess.view(picture(*size)).copy())[None])[0]
        torch.testing.assert_close(got, transform(picture(*size)), rtol=0, atol=1e-6)


def test_timm_inputs_of_other_bands_and_shapes_are_refused() -> None:
    timm = pytest.importorskip("timm")
    from milan_ray.models.timm_zoo import _preprocess

    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    for size in ((1, 32, 32), (4, 32, 32), (3, 32, 48)):
        with pytest.raises(MilanError, match="which a view cannot make"):
            _preprocess(timm, "resnet18", data | {"input_size": size})


def test_inputs_are_those_of_torchvisions_published_transforms() -> None:
    seen = set()
    for name in models.list_models(module=models):
        spec = get_model(f"{name}/imagenet")
        for version in models.get_model_weights(name):
            preprocess, transform = spec.published[version.name].preprocess, version.transforms()
            if repr(transform) in seen:
                continue
            seen.add(repr(transform))
            assert preprocess is not None
            got = preprocess(torch.from_numpy(preprocess.view(picture(150, 207)).copy())[None])[0]
            torch.testing.assert_close(got, transform(picture(150, 207)), rtol=0, atol=1e-6)
    assert len(seen) > 10


@pytest.mark.parametrize("floor", [False, True])
def test_crops_of_either_library_are_found(floor: bool) -> None:
    own = Preprocess(View(248, 224, "bicubic", floor=floor), (0.5,) * 3, (0.25,) * 3)
    found, swapped = fit(lambda image: own(torch.from_numpy(own.view(image).copy())[None])[0].numpy(), {"resample": 3})
    assert (found.view, swapped) == (own.view, False)
