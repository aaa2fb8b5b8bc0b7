"""Families of networks, read as their own libraries say: a sample here, all of them in the slow suite."""

from __future__ import annotations

import pytest
import torch

from milan_ray.benchmarks.conformance import Result, check, page, summary
from milan_ray.benchmarks.conformance_cases import cases
from milan_ray.plugins import load_plugins

load_plugins()

SAMPLE = {
    "torchvision": ("mobilenet_v3", "regnet_x", "resnet", "shufflenet_v2", "mnasnet"),
    "timm": ("convnext", "efficientnet", "mambaout", "resnet", "starnet", "vision_transformer"),
    "transformers": (
        "Beit", "CLIPVision", "ConvNext", "DINOv3ViT", "DeiT", "Dinov2WithRegisters", "Hiera", "MobileNetV1",
        "PoolFormer", "ResNet", "SamVision", "Swin", "VitDet", "Yolos",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("library", "family"), [(key, name) for key, names in SAMPLE.items() for name in names])
def test_conformance_family_is_read_as_its_library_says(library: str, family: str) -> None:
    pytest.importorskip(library)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (case,) = cases(library, family, side=96)
        result = check(case)
    finally:
        torch.set_num_threads(threads)
    assert result.verdict == "right", result
    assert result.defaults_run and not result.refused


@pytest.mark.slow
def test_conformance_no_family_is_wrong_and_nearly_all_run_with_their_default_layers() -> None:
    pytest.importorskip("timm")
    results = [check(case) for case in cases(side=128)]
    built = [result for result in results if result.built]
    assert not [result.verdict for result in built if result.wrong]
    assert sum(result.defaults_run for result in built) >= 0.95 * len(built), summary(results)


def test_conformance_page_names_what_is_wrong_and_what_is_refused() -> None:
    wrong = Result("timm", "one", "net", wrong={"conv": "8 units instead of 16"})
    refused = Result("timm", "two", "net", refused={"": "no | fixed size."})
    absent = Result("timm", "three", "net", built=False, refused={"": "reason"})
    text = page([wrong, refused, absent])
    assert "WRONG: conv: 8 units instead of 16 |" in text and "refused: no \\| fixed size." in text
    assert "does not build: reason" in text and "2 families of 3 build; 1 wrong" in text


def test_conformance_sees_units_taken_for_positions() -> None:
    """The comparison itself: maps whose axes are exchanged are not taken for right."""
    from milan_ray.benchmarks.conformance import _difference

    maps = torch.rand(3, 5, 4, 4)
    assert _difference(maps, maps) is None
    assert _difference(maps.transpose(2, 3), maps) == "positions in another order"
    assert _difference(maps.flip(1), maps) == "units in another order"
    assert "4 units instead of 5" in str(_difference(maps.movedim(3, 1), maps))
