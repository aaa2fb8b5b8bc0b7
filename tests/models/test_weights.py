from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.weights import load_strictly, read_state_dict, weights_digest


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_read_state_dict_wrapped_or_not_gives_the_weights(tmp_path: Path, wrap: object) -> None:
    state = net().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")  # type: ignore[operator]
    assert list(read_state_dict(str(tmp_path / "w.pth"))) == list(state)


def test_read_state_dict_data_parallel_prefix_is_taken_off(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    assert list(read_state_dict(str(tmp_path / "w.pt"))) == list(state)


def test_read_state_dict_safetensors_gives_the_weights(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    loaded = read_state_dict(str(tmp_path / "w.safetensors"))
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_read_state_dict_malicious_file_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "w.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(MilanError, match="never executed"):
            read_state_dict(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 10, 200, 0.5, 0.99])
def test_read_state_dict_truncated_file_is_one_clear_error(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(MilanError, match=f"weights file .*{suffix}") as caught:
        read_state_dict(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(3)])
def test_read_state_dict_other_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(MilanError, match="holds no state dict"):
        read_state_dict(str(tmp_path / "w.pth"))


def test_read_state_dict_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"no weights file at .*absent\.pth"):
        read_state_dict(str(tmp_path / "absent.pth"))


def test_load_strictly_half_precision_becomes_float32() -> None:
    model, state = net(), {name: tensor.half() for name, tensor in net().state_dict().items()}
    load_strictly(model, state, "w.pth")
    weight = model.state_dict()["0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["0.weight"].float())


def test_load_strictly_without_batchnorm_counters_loads() -> None:
    state = {name: tensor for name, tensor in net().state_dict().items() if "num_batches" not in name}
    load_strictly(net(), state, "w.pth")


def test_load_strictly_misfit_names_the_first_weights_and_loads_nothing() -> None:
    model = net()
    before = weights_digest(model)
    state = net(classes=5).state_dict()
    state["other.weight"] = state.pop("0.weight")
    with pytest.raises(
        MilanError, match=r"1 missing \(first: 0\.weight\), 1 unexpected \(first: other\.weight\), 2 of"
    ):
        load_strictly(model, state, "w.pth")
    assert weights_digest(model) == before


def test_weights_digest_changes_with_values_names_shapes_and_types_only() -> None:
    model = net()
    digest = weights_digest(model)
    copy = net()
    copy.load_state_dict(model.state_dict())
    assert weights_digest(copy) == digest
    copy.state_dict()["1.running_mean"][0] += 1e-6
    assert weights_digest(copy) != digest
    assert weights_digest(nn.Sequential(model)) != digest
    assert weights_digest(net().to(torch.bfloat16)) != weights_digest(net())


def test_read_state_dict_that_holds_itself_or_numbers_is_refused(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["state_dict"] = endless
    for content in (endless, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(MilanError, match="holds no state dict"):
            read_state_dict(str(tmp_path / "w.pth"))
