"""Sparse autoencoders of ViT-Prisma against its formulas."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, common, random, top

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions

GATED = {"b_gate": random(FEATURES, seed=2), "r_mag": random(FEATURES, seed=3), "b_mag": random(FEATURES, seed=4)}


@dataclass
class VisionModelSAERunnerConfig:
    """As the configuration object in older files, whose class is not there when they are read."""

    activation_fn_str: str = "relu"
    normalize_activations: str = "layer_norm"
    kwargs: dict = field(default_factory=lambda: {"k": 3, "weights": torch.ones(3)})


def config(**entries: object) -> dict[str, object]:
    defaults: dict[str, object] = {
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "layer_norm",
        "is_transcoder": False,
        "device": {"__type__": "torch.device", "value": "cuda"},
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
    }
    return defaults | entries


def save(folder: Path, entries: dict[str, object] | None, **others: torch.Tensor) -> Path:
    folder.mkdir()
    torch.save(common() | others, folder / "weights.pt")
    if entries is not None:
        (folder / "config.json").write_text(json.dumps(entries))
    return folder


def formula(x, activation, normalisation="layer_norm"):
    t = common()
    mean, deviation = x.mean(1, keepdim=True), x.var(1, keepdim=True).sqrt()
    length = x.square().sum(1, keepdim=True).sqrt() / WIDTH**0.5
    normal = {"none": x, "layer_norm": (x - mean) / (deviation + 1e-5), "constant_norm_rescale": x / length}
    z = activation((normal[normalisation] - t["b_dec"]) @ t["W_enc"])
    out = z @ t["W_dec"] + t["b_dec"]
    return z, {"none": out, "layer_norm": out * deviation + mean, "constant_norm_rescale": out * length}[normalisation]


def relu(product):
    return (product + common()["b_enc"]).clamp(min=0)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_standard_always_subtracts_the_decoders_bias(normalisation, tmp_path):
    folder = save(tmp_path / "sae", config(normalize_activations=normalisation))
    for path in (folder, folder / "weights.pt", folder / "config.json"):
        assert_follows(read_dictionary(path), lambda x: formula(x, relu, normalisation))


@pytest.mark.parametrize("after", [None, "relu", "identity"])
def test_topk_is_rectified_unless_the_file_says_otherwise(after, tmp_path):
    kwargs = {"k": 7} | ({"postact_fn": after} if after else {})
    made = read_dictionary(save(tmp_path / "sae", config(activation_fn_str="topk", activation_fn_kwargs=kwargs)))
    assert made.sparse == 7

    def activation(product):
        kept = top(product + common()["b_enc"], 7)
        return kept if after == "identity" else kept.clamp(min=0)

    assert_follows(made, lambda x: formula(x, activation))


def test_tanh_relu(tmp_path):
    made = read_dictionary(save(tmp_path / "sae", config(activation_fn_str="tanh-relu")))
    assert_follows(made, lambda x: formula(x, lambda p: relu(p).tanh()))


def gate(product):
    return ((product * GATED["r_mag"].exp() + GATED["b_mag"]).clamp(min=0)) * (product + GATED["b_gate"] > 0)


def test_gated(tmp_path):
    folder = save(tmp_path / "sae", config(architecture="gated"), **GATED)
    assert_follows(read_dictionary(folder), lambda x: formula(x, gate))


def test_options_replace_the_configuration(tmp_path):
    folder = save(tmp_path / "sae", config())
    options = ReadingOptions(activation="topk", k=2, normalisation="none")
    made = read_dictionary(folder, options)
    assert_follows(made, lambda x: formula(x, lambda p: top(p + common()["b_enc"], 2).clamp(min=0), "none"))


def old_file(path: Path, **others: torch.Tensor) -> Path:
    torch.save({"cfg": VisionModelSAERunnerConfig(), "state_dict": common() | others}, path)
    return path


def test_older_file_gives_its_tensors_and_asks_for_the_rest(tmp_path):
    file = old_file(tmp_path / "final_sae.pt")
    with pytest.raises(MilanError, match="do not say their format"):
        read_dictionary(file)
    with pytest.raises(MilanError, match=r"do not say how they normalise.*: give normalisation"):
        read_dictionary(file, ReadingOptions("prisma"))
    with pytest.raises(MilanError, match="do not say their activation: give activation"):
        read_dictionary(file, ReadingOptions("prisma", normalisation="layer_norm"))
    with pytest.raises(MilanError, match="do not say how many features TopK keeps at a position: give k"):
        read_dictionary(file, ReadingOptions("prisma", normalisation="layer_norm", activation="topk"))
    made = read_dictionary(file, ReadingOptions("prisma", normalisation="layer_norm", activation="relu"))
    assert_follows(made, lambda x: formula(x, relu))


def test_older_file_of_a_gated_dictionary_is_known_by_its_tensors(tmp_path):
    file = old_file(tmp_path / "final_sae.pt", **GATED)
    made = read_dictionary(file, ReadingOptions("prisma", normalisation="none", activation="relu"))
    assert_follows(made, lambda x: formula(x, gate, "none"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (config(is_transcoder=True), "transcoder"),
        (config(architecture="jumprelu"), "architecture 'jumprelu', which is not read"),
        (config(activation_fn_str="leaky_relu"), "give activation, one of relu"),
        (config(activation_fn_str="topk"), "give k"),
        (config(activation_fn_str="topk", activation_fn_kwargs=[3]), "entry activation_fn_kwargs"),
        (config(activation_fn_str="topk", activation_fn_kwargs={"k": 3, "postact_fn": "gelu"}), "postact_fn 'gelu'"),
        (config(normalize_activations="batch_norm"), "give normalisation"),
        (config(architecture="gated"), "lack the tensor b_mag"),
    ],
)
def test_what_is_not_known_is_refused(entries, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "sae", entries))


def test_folder_of_several_files_asks_for_one(tmp_path):
    folder = save(tmp_path / "sae", config())
    torch.save(common(), folder / "n_images_2.pt")
    with pytest.raises(MilanError, match=r"n_images_2.pt, weights.pt.: name it"):
        read_dictionary(folder)
    assert read_dictionary(folder / "n_images_2.pt").count == FEATURES
