"""Folders of dictionary_learning against its formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, common, random, top

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions

W, D = random(FEATURES, WIDTH), random(WIDTH, FEATURES, seed=1)
B, BIAS = random(FEATURES), random(WIDTH)
LINEAR = {"encoder.weight": W, "decoder.weight": D}
WITH_BIAS = LINEAR | {"encoder.bias": B}
TOPK = WITH_BIAS | {"b_dec": BIAS, "k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(0.6)}
GATES = {"r_mag": random(FEATURES, seed=2), "gate_bias": random(FEATURES, seed=3), "mag_bias": random(FEATURES, seed=4)}
THRESHOLD = random(FEATURES, seed=5).abs()


def gate(x):
    plain = (x - BIAS) @ W.T
    return (GATES["r_mag"].exp() * plain + GATES["mag_bias"]).clamp(min=0) * (plain + GATES["gate_bias"] > 0)


def jump(x, threshold, subtract):
    t = common()
    pre = ((x - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]).clamp(min=0)
    z = pre * (pre > threshold)
    return z, z @ t["W_dec"] + t["b_dec"]


def back(z):
    return z, z @ D.T + BIAS


KINDS = {
    "AutoEncoder": (WITH_BIAS | {"bias": BIAS}, lambda x: back(((x - BIAS) @ W.T + B).clamp(min=0))),
    "AutoEncoderNew": (WITH_BIAS | {"decoder.bias": BIAS}, lambda x: back((x @ W.T + B).clamp(min=0))),
    "GatedAutoEncoder": (LINEAR | GATES | {"decoder_bias": BIAS}, lambda x: back(gate(x))),
    "AutoEncoderTopK": (TOPK, lambda x: back(top((x - BIAS) @ W.T + B, 3).clamp(min=0))),
    "BatchTopKSAE": (TOPK, lambda x: back(((x - BIAS) @ W.T + B) * ((x - BIAS) @ W.T + B > 0.6))),
    "MatryoshkaBatchTopKSAE": (
        common() | {"threshold": torch.tensor(0.6), "k": torch.tensor(3), "group_sizes": torch.tensor([4, 8])},
        lambda x: jump(x, 0.6, True),
    ),
    "JumpReluAutoEncoder": (common() | {"threshold": THRESHOLD}, lambda x: jump(x, THRESHOLD, False)),
}


def save(folder: Path, tensors: dict[str, torch.Tensor], **trainer: object) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    if trainer:
        sizes = {"activation_dim": WIDTH, "dict_size": FEATURES, "trainer_class": "T", "device": "cuda:0"}
        (folder / "config.json").write_text(json.dumps({"trainer": sizes | trainer, "buffer": {"d_submodule": WIDTH}}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_follows_its_formula(kind, tmp_path):
    tensors, formula = KINDS[kind]
    folder = save(tmp_path / "run", tensors, dict_class=kind, **({"k": 3} if "k" in tensors else {}))
    for path in (folder, folder / "ae.pt", folder / "config.json"):
        made = read_dictionary(path)
        assert made.sparse == (3 if kind == "AutoEncoderTopK" else None)
        assert_follows(made, formula)


def test_file_without_its_configuration_asks_for_the_class(tmp_path):
    folder = save(tmp_path / "run", TOPK)
    with pytest.raises(MilanError, match="give format"):
        read_dictionary(folder / "ae.pt")
    with pytest.raises(MilanError, match=r"do not say their class: give architecture .AutoEncoder"):
        read_dictionary(folder, ReadingOptions("dictionary_learning"))
    options = ReadingOptions("dictionary_learning", architecture="AutoEncoderTopK")
    assert_follows(read_dictionary(folder, options), KINDS["AutoEncoderTopK"][1])
    other = ReadingOptions("dictionary_learning", architecture="AutoEncoderTopK", k=2)
    assert read_dictionary(folder, other).sparse == 2


def test_threshold_that_was_never_measured_keeps_all_positive_values(tmp_path):
    folder = save(tmp_path / "run", TOPK | {"threshold": torch.tensor(-1.0)}, dict_class="BatchTopKSAE")
    assert_follows(read_dictionary(folder), lambda x: back(((x - BIAS) @ W.T + B).clamp(min=0)))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "CrossCoder"}, "give architecture, one of AutoEncoder"),
        ({"dict_class": "AutoEncoderTopK", "k": 13}, "k = 13 features of 12"),
        ({"dict_class": "AutoEncoderTopK", "activation_dim": 6}, "entry activation_dim is 6"),
        ({"dict_class": "GatedAutoEncoder"}, "lack the tensor decoder_bias"),
        ({"dict_class": "JumpReluAutoEncoder"}, "lack the tensor W_enc"),
    ],
)
def test_what_is_not_known_is_refused(trainer, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "run", TOPK, **trainer))
