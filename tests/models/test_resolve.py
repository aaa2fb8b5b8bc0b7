from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.registry import RANDOM, register_model
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import WeightsFile


@pytest.fixture(autouse=True)
def registered() -> None:
    register_model("tiny/mine", lambda weights: nn.Linear(2, 2), ["a", "b"])


def test_resolve_wrong_name_gives_the_nearest() -> None:
    with pytest.raises(MilanError, match=r"unknown model 'tinny/mine'; nearest: tiny/mine"):
        resolve_model("tinny/mine")


def test_resolve_user_choices_are_applied_in_order_without_doubles(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    spec = resolve_model("tiny/mine", str(tmp_path / "w.pth"), ["z", "y", "z"])
    assert (spec.layers, spec.weights) == (("z", "y"), str(tmp_path / "w.pth"))
    spec = resolve_model("tiny/mine")
    assert (spec.layers, spec.weights) == (("a", "b"), None)


def test_resolve_relative_weights_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    assert resolve_model("tiny/mine", "w.pth").weights == str(tmp_path / "w.pth")


def test_resolve_missing_weights_file_is_one_sentence() -> None:
    with pytest.raises(MilanError, match=r"no weights file at .*/absent\.pth for tiny/mine"):
        resolve_model("tiny/mine", "absent.pth")


def test_resolve_random_weights_are_passed_to_the_factory() -> None:
    assert resolve_model("tiny/mine", RANDOM).weights == RANDOM


def test_load_gives_an_eval_model_without_gradients() -> None:
    model = resolve_model("tiny/mine").load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(1, 2)).grad_fn is None


def test_resolve_addresses_with_one_file_name_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        found.append(resolve_model("tiny/mine", f"{(tmp_path / name).as_uri()}/model.safetensors").weights)
    assert [Path(path or "").read_text() for path in found] == ["a", "b"]
    assert WeightsFile.at("https://example.org/a/model.safetensors?download=true").file == "model.safetensors"
