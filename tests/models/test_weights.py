from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.weights import load_strictly, load_weights, read_state_dict, weights_digest


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
    state = {name: tensor + 1 for name, tensor in state.items()}
    model = net()
    load_strictly(model, state, "w.pth")
    loaded = model.state_dict()
    assert {name for name in loaded if name not in state} == {"1.num_batches_tracked"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


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


def test_s16_one_weight_under_two_names_must_be_one(tmp_path):
    network, path = nn.Linear(4, 4), str(tmp_path / "w.pth")
    own = network.state_dict()
    for other, order in itertools.product((own["weight"].clone(), torch.zeros(4, 4)), (1, -1)):
        items = [("weight", own["weight"]), ("_orig_mod.weight", other)][::order]
        torch.save({**dict(items), "bias": own["bias"]}, path)
        if torch.equal(other, own["weight"]):
            load_weights(network, path)
            continue
        with pytest.raises(MilanError, match=r"'(_orig_mod\.)?weight' and '(_orig_mod\.)?weight'.*different numbers"):
            load_weights(network, path)


def test_weights_that_are_nan_are_said(tmp_path, capsys):
    network, path = nn.Linear(4, 4), str(tmp_path / "w.pth")
    torch.save({name: tensor * float("nan") for name, tensor in network.state_dict().items()}, path)
    load_weights(network, path)
    assert "has NaN in 2 weights (first: weight)" in capsys.readouterr().err


def test_weights_of_8_bits_without_their_scales_are_refused(tmp_path):
    network, path = nn.Linear(4, 4), str(tmp_path / "w.pth")
    torch.save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in network.state_dict().items()}, path)
    with pytest.raises(MilanError, match=r"2 of another type \(first: weight torch.float8_e4m3fn\)"):
        load_weights(network, path)


def test_tied_weights_may_stand_in_a_file_once(tmp_path):
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        return network

    saved, network, path = tied(), tied(), str(tmp_path / "w.safetensors")
    save_model(saved, path)
    load_weights(network, path)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm),
        (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_older_norms_of_weights_fit_their_parametrizations(old, new, tmp_path):
    torch.manual_seed(0)
    saved, network, path = old(nn.Linear(4, 3)).eval(), new(nn.Linear(4, 3)).eval(), str(tmp_path / "w.pth")
    torch.save(saved.state_dict(), path)
    load_weights(network, path)
    image = torch.randn(2, 4)
    assert torch.allclose(network(image), saved(image), atol=1e-6)
