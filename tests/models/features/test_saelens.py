"""Folders of SAELens against its formulas, and folders written for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, common, outputs, random, top
from safetensors.torch import load_file, save_file

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import layer_of, read_dictionary
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions
from milan_ray.models.features.saelens import write_saelens

GATED = {"b_gate": random(FEATURES, seed=2), "r_mag": random(FEATURES, seed=3), "b_mag": random(FEATURES, seed=4)}


def save(folder: Path, config: dict[str, object], **others: torch.Tensor) -> Path:
    folder.mkdir()
    tensors = common() | others
    if config.get("architecture") == "gated":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "b_enc"} | GATED
    save_file(tensors, folder / "sae_weights.safetensors")
    sizes = {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", "device": "cuda"}
    (folder / "cfg.json").write_text(json.dumps(sizes | config))
    return folder


def new(**config: object) -> dict[str, object]:
    """A configuration of version 6."""
    defaults: dict[str, object] = {
        "architecture": "standard",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.22.1", "hook_name": "blocks.3.hook_resid_post"},
    }
    return defaults | config


def old(**config: object) -> dict[str, object]:
    """A configuration of versions 3 to 5."""
    return {"architecture": "standard", "activation_fn_str": "relu", "hook_name": "h", "hook_layer": 3} | config


def formula(x, activation, subtract=True, normalisation="none", tensors=None):
    """The formula of all architectures, with the normalisation undone at the end."""
    t = tensors or common()
    mean, deviation = x.mean(1, keepdim=True), x.var(1, keepdim=True).sqrt()
    length = x.square().sum(1, keepdim=True).sqrt() / WIDTH**0.5
    normal = {"none": x, "layer_norm": (x - mean) / (deviation + 1e-5), "constant_norm_rescale": x / length}
    inside = normal[normalisation] - t["b_dec"] * subtract
    z = activation(inside @ t["W_enc"])
    out = z @ t["W_dec"] + t["b_dec"]
    return z, {"none": out, "layer_norm": out * deviation + mean, "constant_norm_rescale": out * length}[normalisation]


def relu(product):
    return (product + common()["b_enc"]).clamp(min=0)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_standard_follows_its_biases_and_normalisation(subtract, normalisation, tmp_path):
    config = new(apply_b_dec_to_input=subtract, normalize_activations=normalisation)
    made = read_dictionary(save(tmp_path / "sae", config))
    assert (made.count, made.width, made.sparse) == (FEATURES, WIDTH, None)
    assert_follows(made, lambda x: formula(x, relu, subtract, normalisation))


@pytest.mark.parametrize(
    "config",
    [
        new(architecture="topk", k=3),
        old(activation_fn_str="topk", activation_fn_kwargs={"k": 3}),
        old(architecture="topk", activation_fn_str="relu", activation_fn_kwargs={"k": 3}),
        old(activation_fn="topk", activation_fn_kwargs={"k": 3}, normalize_activations=None),
    ],
)
def test_topk_is_found_where_each_version_says_it(config, tmp_path):
    made = read_dictionary(save(tmp_path / "sae", config))
    assert made.sparse == 3
    assert_follows(made, lambda x: formula(x, lambda p: top(p + common()["b_enc"], 3).clamp(min=0)))


def test_topk_of_options_replaces_that_of_the_file(tmp_path):
    folder = save(tmp_path / "sae", new(architecture="topk", k=3))
    assert read_dictionary(folder, ReadingOptions(k=5)).sparse == 5


def test_topk_that_compares_what_features_add(tmp_path):
    config = new(architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    norms = common()["W_dec"].square().sum(1).sqrt()

    def rescaled(x):
        z = top(((x - common()["b_dec"]) @ common()["W_enc"] + common()["b_enc"]) * norms, 3).clamp(min=0)
        return z, (z / norms) @ common()["W_dec"] + common()["b_dec"]

    assert_follows(read_dictionary(save(tmp_path / "sae", config)), rescaled)


@pytest.mark.parametrize("name", ["threshold", "log_threshold"])
def test_jumprelu_keeps_what_is_above_its_threshold(name, tmp_path):
    stored = random(FEATURES, seed=6) / 2
    threshold = stored if name == "threshold" else stored.exp()

    def jump(product):
        pre = product + common()["b_enc"]
        return torch.where(pre > threshold, pre, torch.zeros(())).clamp(min=0)

    folder = save(tmp_path / "sae", new(architecture="jumprelu"), **{name: stored})
    assert_follows(read_dictionary(folder), lambda x: formula(x, jump))


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_of_a_training_has_one_threshold(architecture, tmp_path):
    folder = save(tmp_path / "sae", new(architecture=architecture, k=3.5), topk_threshold=torch.tensor(0.7).double())

    def jump(product):
        pre = product + common()["b_enc"]
        return pre * (pre > 0.7)

    assert_follows(read_dictionary(folder), lambda x: formula(x, jump))


def test_gated_has_two_paths(tmp_path):
    def gate(product):
        return ((product * GATED["r_mag"].exp() + GATED["b_mag"]).clamp(min=0)) * (product + GATED["b_gate"] > 0)

    assert_follows(read_dictionary(save(tmp_path / "sae", new(architecture="gated"))), lambda x: formula(x, gate))


def test_tanh_relu_of_old_versions(tmp_path):
    made = read_dictionary(save(tmp_path / "sae", old(activation_fn_str="tanh-relu")))
    assert_follows(made, lambda x: formula(x, lambda p: relu(p).tanh()))


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (new(metadata={"sae_lens_version": "6.0.0", "hook_name": "layer4.1"}), "layer4.1"),
        (old(hook_name="layer4"), "layer4"),
        (old(hook_name="blocks.3.hook_resid_post"), None),
        (new(metadata={}), None),
        (new(), None),
    ],
)
def test_layer_is_known_where_the_hook_is_a_module(config, layer, tmp_path):
    folder = save(tmp_path / "sae", config)
    assert layer_of(folder) == layer_of(str(folder / "cfg.json")) == layer
    assert layer_of(tmp_path / "absent.npy") is None
    np.save(folder / "w.npy", np.eye(3))
    assert layer_of(folder / "w.npy") is None


def scaled(x, scale):
    z, out = formula(x * scale, relu)
    return z, out / scale


def test_scale_of_the_training_is_asked_for_unless_the_folder_has_it(tmp_path):
    folder = save(tmp_path / "sae", new(normalize_activations="expected_average_only_in"))
    with pytest.raises(MilanError, match=r"do not say what .*: give scale"):
        read_dictionary(folder)
    assert_follows(read_dictionary(folder, ReadingOptions(scale=0.25)), lambda x: scaled(x, 0.25))
    assert_follows(read_dictionary(folder, ReadingOptions(normalisation="none")), lambda x: formula(x, relu))
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5, "has_whitening": false}')
    assert_follows(read_dictionary(folder), lambda x: scaled(x, 0.5))
    (folder / "activation_scaler.json").write_text('{"scaling_factor": "a half"}')
    with pytest.raises(MilanError, match="give scale"):
        read_dictionary(folder)


@pytest.mark.parametrize(("value", "scale"), [(True, 0.5), (False, None)])
def test_normalisation_of_the_first_versions_is_true_or_false(value, scale, tmp_path):
    made = read_dictionary(save(tmp_path / "sae", old(normalize_activations=value)), ReadingOptions(scale=scale))
    assert_follows(made, lambda x: scaled(x, scale or 1))


def test_factors_of_fine_tuning_belong_to_the_decoder(tmp_path):
    factors = random(FEATURES, seed=7)
    folder = save(tmp_path / "sae", old(finetuning_scaling_factor=True), scaling_factor=factors)

    def finetuned(x):
        z, _ = formula(x, relu)
        return z, (z * factors) @ common()["W_dec"] + common()["b_dec"]

    assert_follows(read_dictionary(folder), finetuned)
    ones = save(tmp_path / "ones", old(), scaling_factor=torch.ones(FEATURES))
    assert_follows(read_dictionary(ones), lambda x: formula(x, relu))
    unused = save(tmp_path / "unused", old(), scaling_factor=factors)
    with pytest.raises(MilanError, match=r"scaling_factor that .* says is not used"):
        read_dictionary(unused)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (new(architecture="transcoder"), "architecture 'transcoder', which is not read"),
        (new(architecture="temporal"), "known are standard, topk"),
        (new(architecture=7), "entry architecture is 7"),
        (new(architecture="topk"), "give k"),
        (new(architecture="topk", k=99), "k = 99 features of 12"),
        (new(architecture="topk", k="3"), "entry k is '3'"),
        (new(normalize_activations="whitening"), "give normalisation"),
        (new(apply_b_dec_to_input="yes"), "entry apply_b_dec_to_input is 'yes'"),
        (old(activation_fn_str="gelu"), "activation 'gelu', which is not read"),
        (new(d_in=WIDTH + 1), "entry d_in is 6"),
        (new(architecture="jumprelu"), "lack the tensor threshold"),
    ],
)
def test_what_is_not_known_is_refused(config, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "sae", config))


def made(activation: str, normalisation: str = "none", subtract: bool = True) -> Dictionary:
    bias = random(WIDTH)
    weights = Weights(
        random(FEATURES, WIDTH),
        random(FEATURES, WIDTH, seed=1),
        random(FEATURES),
        bias,
        bias if subtract else None,
        random(FEATURES, seed=2).abs() if activation == "threshold" else None,
        *((random(FEATURES, seed=3), random(FEATURES, seed=4)) if activation == "gated" else (None, None)),
    )
    return Dictionary(weights, activation, 3 if activation == "topk" else None, normalisation)


KEYS = {
    "relu": ("standard", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    "topk": ("topk", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    "threshold": ("jumprelu", {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}),
    "gated": ("gated", {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}),
}


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("activation", KEYS)
def test_written_folders_have_what_saelens_loads_and_are_read_to_the_bit(activation, normalisation, subtract, tmp_path):
    dictionary = made(activation, normalisation, subtract)
    write_saelens(dictionary, tmp_path / "sae", {"model_name": "resnet18", "hook_name": "layer4"})
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    tensors = load_file(tmp_path / "sae/sae_weights.safetensors")
    architecture, keys = KEYS[activation]
    # SAELens loads strictly: exactly these names, of these shapes.
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shapes.get(name, (FEATURES,)) for name in keys
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert config["architecture"] == architecture
    assert (config["d_in"], config["d_sae"], config["dtype"], config["device"]) == (WIDTH, FEATURES, "float32", "cpu")
    assert (config["apply_b_dec_to_input"], config["normalize_activations"]) == (subtract, normalisation)
    assert config["reshape_activations"] == "none" and config.get("k") == dictionary.sparse
    # Below 6, SAELens fills in defaults and drops the metadata.
    assert config["metadata"]["sae_lens_version"].split(".")[0] == "6"
    assert (config["metadata"]["model_name"], config["metadata"]["hook_name"]) == ("resnet18", "layer4")
    back = read_dictionary(tmp_path / "sae")
    assert back.identity() == dictionary.identity()
    state, kept = back.state_dict(), dictionary.state_dict()
    assert set(state) == set(kept) and all(torch.equal(state[name], kept[name]) for name in state)
    assert torch.equal(back.encode(outputs()), dictionary.encode(outputs()))
    assert torch.equal(back.reconstruct(outputs()), dictionary.reconstruct(outputs()))


def test_missing_biases_are_written_as_zeros(tmp_path):
    plain = Dictionary(Weights(random(FEATURES, WIDTH), random(FEATURES, WIDTH, seed=1)))
    write_saelens(plain, tmp_path / "sae", {})
    assert torch.equal(read_dictionary(tmp_path / "sae").encode(outputs()), plain.encode(outputs()))


def test_what_saelens_has_not_is_not_written(tmp_path):
    matrix = random(FEATURES, WIDTH)
    with pytest.raises(MilanError, match="activation identity"):
        write_saelens(Dictionary(Weights(matrix, matrix), "identity"), tmp_path, {})
    with pytest.raises(MilanError, match="two biases"):
        write_saelens(Dictionary(Weights(matrix, matrix, input_bias=random(WIDTH))), tmp_path, {})
    with pytest.raises(MilanError, match="metadata"):
        write_saelens(made("relu"), tmp_path, {"path": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(MilanError, match="cannot write features"):
        write_saelens(made("relu"), tmp_path / "file", {})
