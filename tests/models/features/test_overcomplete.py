"""State dicts of overcomplete against its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, random, top
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions

UNIT = random(FEATURES, WIDTH, seed=1) / random(FEATURES, WIDTH, seed=1).square().sum(1, keepdim=True).sqrt()
LINEAR = {"0.weight": random(FEATURES, WIDTH), "0.bias": random(FEATURES)}
NORM = {
    "1.weight": random(FEATURES, seed=2),
    "1.bias": random(FEATURES, seed=3),
    "1.running_mean": random(FEATURES, seed=4),
    "1.running_var": random(FEATURES, seed=5).square(),
    "1.num_batches_tracked": torch.tensor(7),
}


def state(place: str = "encoder.final_block.", norm: bool = False) -> dict[str, torch.Tensor]:
    encoder = {place + name: tensor for name, tensor in (LINEAR | (NORM if norm else {})).items()}
    return encoder | {"dictionary._weights": UNIT}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def formula(x, activation, norm=False, rows=UNIT):
    pre = x @ LINEAR["0.weight"].T + LINEAR["0.bias"]
    if norm:
        deviation = (NORM["1.running_var"] + 1e-5).sqrt()
        pre = (pre - NORM["1.running_mean"]) / deviation * NORM["1.weight"] + NORM["1.bias"]
    z = activation(pre)
    return z, z @ rows


def relu(pre):
    return pre.clamp(min=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("place", ["encoder.final_block.", "encoder."])
def test_encoder_is_linear_with_or_without_batch_norm(place, norm, tmp_path):
    file = save(tmp_path / "sae.pth", state(place, norm))
    assert_follows(read_dictionary(file, ReadingOptions(activation="relu")), lambda x: formula(x, relu, norm))


def test_topk(tmp_path):
    file = save(tmp_path / "sae.pth", state())
    made = read_dictionary(file, ReadingOptions(activation="topk", k=3))
    assert made.sparse == 3
    assert_follows(made, lambda x: formula(x, lambda pre: top(pre, 3).clamp(min=0)))


def test_batchtopk_keeps_what_equals_its_threshold(tmp_path):
    file = save(tmp_path / "sae.pth", state())
    least = 1.25
    made = read_dictionary(file, ReadingOptions(activation="batchtopk", threshold=least))
    assert_follows(made, lambda x: formula(x, lambda pre: pre * (pre >= least)))
    exact = {"encoder.0.weight": torch.eye(3), "encoder.0.bias": torch.zeros(3), "dictionary.dictionary": torch.eye(3)}
    made = read_dictionary(save(tmp_path / "exact.pth", exact), ReadingOptions(activation="batchtopk", threshold=least))
    assert made.encode(torch.tensor([[1.25, 1.2499999, -2.0]])).tolist() == [[1.25, 0.0, 0.0]]


def test_jumprelu_has_logarithms_of_its_thresholds(tmp_path):
    thresholds = random(FEATURES, seed=9) / 3
    file = save(tmp_path / "sae.pth", state() | {"thresholds": thresholds})
    assert_follows(read_dictionary(file), lambda x: formula(x, lambda pre: pre * (pre >= thresholds.exp())))
    with pytest.raises(MilanError, match="leave out activation"):
        read_dictionary(file, ReadingOptions(activation="relu"))


RAW = 3 * random(FEATURES, WIDTH, seed=1)


@pytest.mark.parametrize("name", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_rows_are_normalised_as_the_options_say_and_multiplied(name, tmp_path):
    stored = {"dictionary._weights": RAW, "dictionary.multiplier": torch.tensor(0.5)}
    file = save(tmp_path / "sae.pth", state() | stored)
    with pytest.raises(MilanError, match="rows are not of length 1: give decoder_normalisation"):
        read_dictionary(file, ReadingOptions(activation="relu"))
    norms = torch.tensor(
        [sum(v * v for v in row) ** 0.5 if "l2" in name else sum(map(abs, row)) for row in RAW.tolist()]
    )
    divisors = {"identity": torch.ones(()), "max": norms.max()}
    rows = RAW / divisors.get(name.split("_")[0], norms[:, None])
    made = read_dictionary(file, ReadingOptions(activation="relu", decoder_normalisation=name))
    assert_follows(made, lambda x: formula(x, relu, rows=rows * 2.718281828**0.5))


def test_archetypal_dictionary_is_a_mixture_of_points(tmp_path):
    points, mixture, relax = random(7, WIDTH), random(FEATURES, 7), random(FEATURES, WIDTH, seed=2) / 9
    stored = {
        "dictionary.C": points,
        "dictionary.W": mixture,
        "dictionary.Relax": relax,
        "dictionary.multiplier": torch.tensor(-0.5),
    }
    tensors = {name: tensor for name, tensor in state().items() if name != "dictionary._weights"} | stored
    shares = torch.tensor([[max(v, 0) / sum(max(w, 0) for w in row) for v in row] for row in mixture.tolist()])
    rows = (shares @ points + relax) * 2.718281828**-0.5
    file = save(tmp_path / "sae.pth", tensors)
    assert_follows(read_dictionary(file, ReadingOptions(activation="relu")), lambda x: formula(x, relu, rows=rows))
    with pytest.raises(MilanError, match="leave out decoder_normalisation"):
        read_dictionary(file, ReadingOptions(activation="relu", decoder_normalisation="l2"))


LAYER_NORM = {f"encoder.final_block.1.{name}": torch.ones(FEATURES) for name in ("weight", "bias")}
HIDDEN = {"encoder.mlp_blocks.0.0.weight": torch.ones(WIDTH, WIDTH)}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (state(), {}, "do not say their activation: give activation"),
        (state(), {"activation": "softmax"}, "give activation, one of relu, topk, batchtopk"),
        (state(), {"activation": "topk"}, "give k"),
        (state(), {"activation": "batchtopk"}, "give threshold .running_threshold"),
        (state(), {"activation": "relu", "decoder_normalisation": "l3"}, "give decoder_normalisation, one of l2"),
        (state() | {"Q": torch.ones(4)}, {"activation": "relu"}, "QSAE"),
        (state() | LAYER_NORM, {"activation": "relu"}, "layer norm"),
        (state() | HIDDEN, {"activation": "relu"}, "no linear map with batch norm .it has encoder"),
        ({"dictionary._weights": UNIT}, {"activation": "relu"}, "it has no tensors"),
    ],
)
def test_what_is_not_known_is_refused(tensors, options, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "sae.pth", tensors), ReadingOptions(**options))


class Pickled(nn.Module):
    """As overcomplete's own tests save it: the whole module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)


def test_whole_modules_are_not_executed(tmp_path):
    torch.save(Pickled(), tmp_path / "sae.pth")
    with pytest.raises(MilanError, match=r"save the model's state_dict\(\)"):
        read_dictionary(tmp_path / "sae.pth", ReadingOptions(format="overcomplete"))
