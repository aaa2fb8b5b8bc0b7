"""Checkpoints of saev, of all its schemas, against its formulas."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, common, top

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions


def save(path: Path, header: object, **others: torch.Tensor) -> Path:
    content = io.BytesIO()
    torch.save(common() | others, content)
    path.write_bytes(json.dumps(header).encode() + b"\n" + content.getvalue())
    return path


def schema(number: int, kind: str, **params: object) -> dict[str, object]:
    activation = {"cls": kind, "params": {"key": "x", "sparsity": {"cls": "NoSparsity", "params": {}}} | params}
    cfg = {"d_model": WIDTH, "d_sae": FEATURES, "activation": activation, "normalize_w_dec": True}
    return {"schema": number, "cfg": cfg, "commit": "abc", "lib": "0.1"}


FIRST = {"d_vit": WIDTH, "exp_factor": 2, "sparsity_coeff": 4e-4, "ghost_grads": False, "seed": 1}


def formula(x, activation, subtract=False):
    t = common()
    z = activation((x - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"])
    return z, z @ t["W_dec"] + t["b_dec"]


def relu(pre):
    return pre.clamp(min=0)


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_relu_without_subtracting_the_bias(number, tmp_path):
    assert_follows(read_dictionary(save(tmp_path / "sae.pt", schema(number, "Relu"))), lambda x: formula(x, relu))


def test_topk_keeps_negative_values(tmp_path):
    made = read_dictionary(save(tmp_path / "sae.pt", schema(5, "TopK", top_k=9)))
    assert made.sparse == 9 and bool((made.encode(torch.zeros(1, WIDTH)) < 0).any())
    assert_follows(made, lambda x: formula(x, lambda pre: top(pre, 9)))


def test_topk_of_more_features_than_there_are_keeps_all(tmp_path):
    made = read_dictionary(save(tmp_path / "sae.pt", schema(5, "TopK", top_k=99)))
    assert_follows(made, lambda x: formula(x, lambda pre: pre))


@pytest.mark.parametrize(("threshold", "least"), [(0.8, 0.8), (0.0, 0.0), (-0.5, 0.0)])
def test_batchtopk_compares_with_its_running_threshold(threshold, least, tmp_path):
    stored = {"activation.threshold": torch.tensor(threshold)}
    made = read_dictionary(save(tmp_path / "sae.pt", schema(4, "BatchTopK", top_k=3), **stored))
    assert_follows(made, lambda x: formula(x, lambda pre: pre * (pre > least)))


def test_batchtopk_without_a_threshold_asks_for_it(tmp_path):
    file = save(tmp_path / "sae.pt", schema(2, "BatchTopK", top_k=3))
    with pytest.raises(MilanError, match="above which value a feature is on: give threshold"):
        read_dictionary(file)
    assert_follows(read_dictionary(file, ReadingOptions(threshold=0.4)), lambda x: formula(x, lambda p: p * (p > 0.4)))


def test_first_versions_subtract_the_bias(tmp_path):
    file = save(tmp_path / "sae.pt", FIRST)
    assert_follows(read_dictionary(file), lambda x: formula(x, relu, True))
    assert_follows(read_dictionary(file, ReadingOptions(subtract_decoder_bias=False)), lambda x: formula(x, relu))


@pytest.mark.parametrize("subtract", [True, False])
def test_schema_1_is_ambiguous_and_asks(subtract, tmp_path):
    file = save(tmp_path / "sae.pt", {"schema": 1, "cls": "TopK", "cfg": {"d_vit": WIDTH, "exp_factor": 2, "top_k": 4}})
    with pytest.raises(MilanError, match="give subtract_decoder_bias"):
        read_dictionary(file)
    made = read_dictionary(file, ReadingOptions(subtract_decoder_bias=subtract))
    assert_follows(made, lambda x: formula(x, lambda pre: top(pre, 4), subtract))


def test_schema_1_of_a_later_version_has_the_activation_inside(tmp_path):
    header = schema(1, "TopK", top_k=4) | {"cls": "SparseAutoencoderConfig"}
    made = read_dictionary(save(tmp_path / "sae.pt", header), ReadingOptions(subtract_decoder_bias=False))
    assert_follows(made, lambda x: formula(x, lambda pre: top(pre, 4)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (schema(6, "Relu"), "schema 6, which is not read"),
        (schema(4, "AbsBatchTopK", top_k=3), "activation 'AbsBatchTopK', which is not read"),
        (schema(5, "TopK"), "give k"),
        (schema(5, "TopK", top_k=-1), "entry top_k is -1"),
        ({"schema": "five"}, "entry schema is 'five'"),
        ({"schema": 5, "cfg": []}, "entry cfg"),
        ({"schema": 5}, "activation None"),
        (FIRST | {"d_vit": WIDTH + 1}, "entry d_vit is 6"),
    ],
)
def test_what_is_not_known_is_refused(header, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "sae.pt", header))


def test_damaged_file_is_named_itself(tmp_path):
    file = save(tmp_path / "sae.pt", schema(5, "Relu"))
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(MilanError, match=str(file)) as raised:
        read_dictionary(file)
    assert "weights.pt" not in str(raised.value)
