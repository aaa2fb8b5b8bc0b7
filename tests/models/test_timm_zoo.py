"""timm's models, where timm is installed; what is said where it is not."""

from __future__ import annotations

import importlib.util

import pytest

from milan_ray.errors import MilanError
from milan_ray.models.establish import establish
from milan_ray.models.registry import RANDOM, get_model
from milan_ray.plugins import load_plugins

load_plugins()
INSTALLED = importlib.util.find_spec("timm") is not None
with_timm = pytest.mark.skipif(not INSTALLED, reason="timm is not installed")


@pytest.mark.skipif(INSTALLED, reason="timm is installed")
def test_timm_absent_says_what_to_install() -> None:
    with pytest.raises(MilanError, match=r"timm, which is not installed: `pip install timm`"):
        get_model("timm/resnet18")


@with_timm
@pytest.mark.parametrize(
    ("name", "prefix", "units", "view"),
    [
        pytest.param(
            *("vit_small_patch16_dinov3.lvd1689m", 5, [1536] * 12, "r256-c256-bicubic-256x256"),
            marks=pytest.mark.slow,
        ),
        ("vit_wee_patch16_reg1_gap_256", 1, [1280] * 14, "r269-c256-bicubic-256x256"),
        ("resnet50.a1_in1k", None, [64, 256, 512, 1024, 2048], "r235-c224-bicubic-224x224"),
        ("swin_tiny_patch4_window7_224", None, [96, 192, 384, 768], "r248-c224-bicubic-224x224"),
    ],
)
def test_timm_model_brings_view_layers_and_prefix_tokens(
    name: str, prefix: int | None, units: list[int], view: str
) -> None:
    spec = get_model(f"timm/{name}")
    assert (spec.prefix_tokens, spec.preprocess.view.key) == (prefix, view)
    model = spec.factory(RANDOM).eval()
    layouts = establish(spec, model, spec.layers)
    assert [layouts[layer].units for layer in spec.layers] == units
    assert {layouts[layer].prefix_tokens for layer in spec.layers} == {prefix or 0}


@with_timm
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("cait_xxs24_224", [768] * 24),
        ("xcit_nano_12_p16_224", [512] * 12),
        ("vit_small_plus_patch16_dinov3", [384] * 12),  # gated MLPs, so its blocks
    ],
)
def test_timm_families_have_default_layers_that_run(name: str, units: list[int]) -> None:
    spec = get_model(f"timm/{name}")
    layouts = establish(spec, spec.factory(RANDOM).eval(), spec.layers)
    assert [layouts[layer].units for layer in spec.layers] == units
    assert all(layout.grid[0] > 1 for layout in layouts.values())


@with_timm
def test_timm_weights_are_looked_for_under_name_and_tag() -> None:
    files = get_model("timm/resnet50.a1_in1k").published
    assert files["a1_in1k"].file == "resnet50.a1_in1k.safetensors"
    assert files["a1_in1k"].url == "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors"


@with_timm
def test_timm_wrong_name_answers_with_the_nearest() -> None:
    for name in ("resnet51", "resnet50.nobody"):
        with pytest.raises(MilanError, match=rf"unknown timm model '{name}'; nearest: resnet50"):
            get_model(f"timm/{name}")
