"""Files of weights as training frameworks leave them: what fits is loaded and said, the rest is one sentence."""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.weights import load_weights, read_state_dict, weights_digest

State = dict[str, torch.Tensor]


def net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


class AttributeDict(dict):
    """As Lightning's: a dict with a class of its own."""


def lightning(state: State) -> dict[str, object]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "state_dict": below("model.", state) | {"loss.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]}],
        "callbacks": {"Best": {"best_model_score": torch.tensor(0.5), "path": Path("x.ckpt")}},
        "hyper_parameters": AttributeDict(lr=0.1, args=argparse.Namespace(size=np.float64(3), when=np.arange(3))),
        "seen": collections.defaultdict(list, {"a": [1]}),
        "big": 2**3000,
    }


WRAPPED: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "_orig_mod.": lambda s: below("_orig_mod.", s),
    "module.": lambda s: below("module.", s),
    "model.": lambda s: below("model.", s),
    "net._orig_mod.module.": lambda s: {"state_dict": below("net._orig_mod.module.", s)},
    "compiled inside": lambda s: {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in s.items()},
    "encoder.backbone.": lambda s: {"model": below("encoder.backbone.", s), "optimizer": {"state": {}}, "epoch": 1},
    "net": lambda s: {"net": s, "acc": 0.5, "epoch": 1},
    "model_ema": lambda s: {"model_ema": below("module.", s), "args": argparse.Namespace(lr=0.1)},
    "swa": lambda s: {**below("module.", s), "n_averaged": torch.tensor(3)},
    "copies": lambda s: {"state_dict": s, "model": {name: tensor.clone() for name, tensor in s.items()}},
    "half": lambda s: {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in s.items()},
    "numbers of numpy": lambda s: {"state_dict": s, "best": np.float32(0.5), "rng": np.arange(5)},
    "lightning": lightning,
    "optimized_model": lambda s: {"optimized_model": s, "optimizer_state_dict": {"exp_avg": torch.zeros(3)}},
    "scaler_net": lambda s: {"scaler_net": s, "lr_scheduler": {"last": torch.zeros(3)}},
    "list": lambda s: [s],
    "tuple": lambda s: (s, {"lr": 0.1}),
    "deep": lambda s: {"a": {"b": [{"c": {"d": s}}]}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_and_prefixed_weights_are_loaded_and_said(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained, model, path = net(seed=1), net(), str(tmp_path / "w.pth")
    torch.save(WRAPPED[how](trained.state_dict()), path)
    load_weights(model, path)
    said = capfd.readouterr().err
    for name, tensor in model.state_dict().items():
        expected = trained.state_dict()[name]
        torch.testing.assert_close(
            tensor, (expected.half() if how == "half" else expected).to(tensor.dtype), rtol=0, atol=0
        )
    assert (path in said) == (how not in ("plain", "half"))
    if how == "lightning":
        assert "state_dict.model of" in said and "loss.weight" in said and "argparse.Namespace" in said


TWO: dict[str, tuple[Callable[[State, State], object], str]] = {
    "wrappers": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict_ema"),
    "prefixes": (lambda a, b: {"state_dict": below("model.", a) | below("ema.module.", b)}, "state_dict.ema"),
    "teacher": (lambda a, b: {"student": below("module.net.", a), "teacher": below("net.", b)}, "teacher"),
}


@pytest.mark.parametrize("how", TWO)
def test_several_networks_in_a_file_are_named_and_can_be_chosen(how: str, tmp_path: Path) -> None:
    make, part = TWO[how]
    one, two, path = net(seed=1), net(seed=2), str(tmp_path / "w.pth")
    torch.save(make(one.state_dict(), two.state_dict()), path)
    model = net()
    with pytest.raises(MilanError, match=rf"several networks, .*{part}.*choose one by --weights {path}#"):
        load_weights(model, path)
    assert weights_digest(model) == weights_digest(net())
    load_weights(model, f"{path}#{part}")
    assert weights_digest(model) == weights_digest(two)
    with pytest.raises(MilanError, match="holds no part 'nobody'"):
        load_weights(model, f"{path}#nobody")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: below("model.", net(5).state_dict()),
            r"3\.weight \(5, 4\) for \(3, 4\).*below 'model'; .*another head",
        ),
        (
            lambda: below("backbone.", nn.Sequential(*net()[:3]).state_dict()),
            r"2 missing \(first: 3\.weight.*other parts",
        ),
        (
            lambda: below("a.b.", {"c": torch.zeros(1), "d": torch.ones(1)}),
            r"names begin with 'a\.b\.': save the state_",
        ),
        (lambda: {"x": torch.zeros(1), "y": torch.ones(1)}, r"names are others \(x\): save the state_dict\(\) again"),
        (lambda: net(), "holds no state dict"),
    ],
)
def test_weights_that_do_not_fit_name_prefix_and_remedy(make: Callable[[], object], words: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "w.pth")
    model = net()
    with pytest.raises(MilanError, match=words) as caught:
        load_weights(model, str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
    assert weights_digest(model) == weights_digest(net())


def test_numbers_of_another_type_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in net().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(MilanError, match=r"of another type \(first: 0\.weight torch\.int8\)"):
        load_weights(net(), str(tmp_path / "w.pth"))


class Command:
    """Runs something when it is unpickled, by whichever name."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.reduced


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_commands_beside_the_weights_are_never_executed(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "executed"
    commands = [
        Command(os.mkdir, str(target)),
        Command(os.system, f"touch {target}"),
        Command(subprocess.check_call, ["touch", str(target)]),
        Command(eval, f"open({str(target)!r}, 'w')"),
        Command(getattr, Command(__import__, "os"), "mkdir"),
        Command(torch.load, str(target)),
        Command(torch.Tensor.resize_, torch.zeros(1), 2**40),
    ]
    trained, path = net(seed=1), str(tmp_path / "w.pth")
    torch.save({"state_dict": trained.state_dict(), "options": commands}, path, pickle_protocol=protocol)
    model = net()
    load_weights(model, path)
    assert weights_digest(model) == weights_digest(trained)
    assert not target.exists()


def test_without_a_network_several_state_dicts_are_a_question(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save({"model": below("module.", net().state_dict()), "model_ema": net(seed=1).state_dict()}, path)
    with pytest.raises(MilanError, match="several networks, model, model_ema: choose one"):
        read_state_dict(path)
    assert list(read_state_dict(f"{path}#model")) == list(net().state_dict())


def quantized(
    net: nn.Module, dtype: torch.dtype = torch.qint8, kinds: tuple[type, ...] = (nn.Linear, nn.LSTM)
) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, set(kinds), dtype=dtype)


class Recurrent(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(3, 4)


class Sparse(nn.Module):
    def __init__(self, seed: int, layout: torch.layout = torch.sparse_coo) -> None:
        super().__init__()
        weight = torch.full((3, 3), float(seed)) * torch.eye(3)
        self.register_buffer("weight", weight.to_sparse(layout=layout))


class Extra(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def get_extra_state(self) -> object:
        return {"scale": torch.tensor(self.seed), "history": [1, "a", None, self.seed]}

    def set_extra_state(self, _: object) -> None: ...


NUMBERS: dict[str, Callable[[int], nn.Module]] = {
    "int8": lambda seed: quantized(net(seed=seed)),
    "float16 packed": lambda seed: quantized(net(seed=seed), torch.float16),
    "int8 recurrent": lambda seed: quantized(Recurrent(seed)),
    "half": lambda seed: net(seed=seed).half(),
    "bfloat16": lambda seed: net(seed=seed).bfloat16(),
    "double": lambda seed: net(seed=seed).double(),
    "complex": lambda seed: net(seed=seed).to(torch.complex64),
    "sparse": Sparse,
    "sparse rows": lambda seed: Sparse(seed, torch.sparse_csr),
    "extra state": Extra,
    "nothing": lambda seed: nn.Identity() if seed else nn.Sequential(Extra(0)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NUMBERS)
def test_networks_of_any_numbers_have_an_identity(kind: str) -> None:
    one, same, other = (weights_digest(NUMBERS[kind](seed)) for seed in (1, 1, 2))
    assert one == same
    assert (one != other) == (kind != "nothing")


def test_identity_of_an_ordinary_network_is_what_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for index, tensor in enumerate(model.state_dict().values()):
        tensor.fill_(index)
    expected = "6116839385263371f55809eedc682236f7aa78a40f449c49e7d1d62f1c60d31a"
    assert weights_digest(model) == expected


def test_weights_that_cannot_be_identified_are_one_sentence() -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> object:
            return object()

    with torch.device("meta"):
        without_memory = nn.Linear(2, 2)
    for model, words in ((Odd(), "_extra_state is a object"), (without_memory, "meta device"), (nn.LazyLinear(3), ".")):
        with pytest.raises(
            MilanError, match=rf"^the weights of {type(model).__name__} cannot be identified \(.*{words}"
        ):
            weights_digest(model)
