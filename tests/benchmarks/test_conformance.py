"""Families of networks, read as their own libraries say: a sample here, all of them by `make conformance`."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from milan_ray.benchmarks.conformance import Result, check, page, read_rows, summary, to_row
from milan_ray.benchmarks.conformance_cases import cases
from milan_ray.errors import MilanError
from milan_ray.plugins import load_plugins

load_plugins()

SAMPLE = {
    "torchvision": ("mobilenet_v3", "regnet_x", "shufflenet_v2", "mnasnet"),
    "timm": ("convnext", "efficientnet", "levit", "mambaout", "resnet", "vision_transformer"),
    "transformers": (
        "Beit", "CLIPVision", "ConvNext", "Cvt", "DINOv3ViT", "DeiT", "Dinov2WithRegisters", "Hiera", "MobileNetV1",
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
@pytest.mark.skipif("MILAN_CONFORMANCE" not in os.environ, reason="all families take half an hour: `make conformance`")
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


PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def listed() -> dict[tuple[str, str, str], str]:
    """What docs/conformance.md says: (library, family, network) → result."""
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "|" in line][2:]
    return {(row[0].strip(), row[1], row[2].strip("`")): row[-1].strip() for row in rows}


def test_conformance_page_has_every_family_none_of_them_wrong() -> None:
    results = list(listed().values())
    assert len(results) > 180 and not [result for result in results if result.startswith("WRONG")]
    assert sum(result == "right" for result in results) >= 0.95 * len(results)


def test_conformance_page_lists_the_families_of_the_installed_versions() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    said = re.search(r"^torch (\S+), torchvision (\S+), timm (\S+), transformers (\S+)\. \d", PAGE.read_text(), re.M)
    assert said is not None
    if said.groups() != tuple(metadata.version(name) for name in ("torch", "torchvision", "timm", "transformers")):
        pytest.skip(f"the page is about {said[0][:-1]}others are installed")
    assert list(listed()) == [(case.library, case.family, case.network) for case in cases()]


def test_conformance_results_come_back_from_what_was_printed_and_other_files_are_refused(tmp_path) -> None:
    result = Result("timm", "one", "net", (96, 96), defaults=2, defaults_run=True, compared=3, refused={"a": "no."})
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(to_row(result)) + "\n")
    (read,) = read_rows(file)
    assert page([read]) == page([result])
    file.write_text(json.dumps({**to_row(result), "versions": {"timm": "0.1"}}))
    with pytest.raises(MilanError, match=r"rows.jsonl holds results of .*0\.1.*make it again"):
        read_rows(file)
    file.write_text("[1]")
    with pytest.raises(MilanError, match="does not hold results"):
        read_rows(file)


def test_conformance_sees_units_taken_for_positions() -> None:
    """The comparison itself: maps whose axes are exchanged are not taken for right."""
    from milan_ray.benchmarks.conformance import _difference

    maps = torch.rand(3, 5, 4, 4)
    assert _difference(maps, maps) is None
    assert _difference(maps.transpose(2, 3), maps) == "positions in another order"
    assert _difference(maps.flip(1), maps) == "units in another order"
    assert "4 units instead of 5" in str(_difference(maps.movedim(3, 1), maps))
