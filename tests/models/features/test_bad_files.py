"""Files of features that are damaged, hostile, or of another model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from features import FEATURES, WIDTH, common, random
from safetensors.torch import save_file

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import FORMATS, ReadingOptions


def saelens(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard"}))
    return folder


def saev(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "rest.pt")
    header = {"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {}}}}
    (folder / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + (folder / "rest.pt").read_bytes())
    (folder / "rest.pt").unlink()
    return folder / "sae.pt"


def prisma(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps({"activation_fn_str": "relu", "normalize_activations": "none"}))
    return folder


def matrix(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    np.save(folder / "w.npy", tensors["W_dec"].numpy())
    return folder / "w.npy"


Save = Callable[[Path, dict[str, torch.Tensor]], Path]

SAVES = (saelens, saev, prisma, matrix)
WIDE = ReadingOptions(width=WIDTH)


def the_file(path: Path) -> Path:
    """The file with the tensors."""
    return path if path.is_file() else next(file for file in path.iterdir() if file.suffix != ".json")


@pytest.mark.parametrize("save", SAVES)
def test_whole_files_are_read(save, tmp_path):
    assert read_dictionary(save(tmp_path, common()), WIDE).count == FEATURES


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("keep", [0, 1, 40, -1, -100])
def test_truncated_files_are_one_sentence(save, keep, tmp_path):
    path = save(tmp_path, common())
    file = the_file(path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(MilanError) as raised:
        read_dictionary(path, WIDE)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_a_tensor_is_refused(save, value, tmp_path):
    tensors = common()
    tensors["W_dec"][3, 2] = value
    with pytest.raises(MilanError, match="NaN or infinite numbers: fetch or save them again"):
        read_dictionary(save(tmp_path, tensors), WIDE)


@pytest.mark.parametrize("save", SAVES)
def test_features_of_another_width_are_refused(save, tmp_path):
    with pytest.raises(MilanError, match="of a layer with 5 units, and this layer has 768: give those of this layer"):
        read_dictionary(save(tmp_path, common()), ReadingOptions(width=768))


@pytest.mark.parametrize("save", [saelens, saev, prisma])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_missing_tensors_are_named(save, name, tmp_path):
    tensors = {other: tensor for other, tensor in common().items() if other != name}
    with pytest.raises(MilanError, match=f"lack the tensors? .*{name}"):
        read_dictionary(save(tmp_path, tensors))


@pytest.mark.parametrize("save", [saelens, saev, prisma])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("W_dec", random(WIDTH, FEATURES), "W_dec has the shape .5, 12. and not .12, 5."),
        ("b_enc", random(1, FEATURES), "b_enc has the shape"),
        ("W_enc", random(FEATURES), "W_enc has the shape .12,., which is no matrix"),
        ("W_enc", torch.ones(WIDTH, FEATURES, dtype=torch.int8), "W_enc holds torch.int8"),
        ("W_enc", torch.ones(WIDTH, FEATURES, dtype=torch.bool), "W_enc holds torch.bool"),
    ],
)
def test_tensors_that_do_not_fit_are_named(save, name, tensor, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path, common() | {name: tensor}))


@pytest.mark.parametrize("save", [saelens, saev, prisma])
def test_half_precision_becomes_float32(save, tmp_path):
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in common().items()}
    made = read_dictionary(save(tmp_path, halves))
    assert made.encoder.dtype == torch.float32
    assert torch.equal(made.directions, halves["W_dec"].float())


CONFIGS = ["", "{", "[1]", "null", "[" * 100_000, '{"a": 1e999', '"text"', "\x00\xff", '{"k": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("save", [saelens, prisma])
@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_damaged_configurations_are_one_sentence(save, text, tmp_path):
    folder = save(tmp_path, common())
    next(folder.glob("*.json")).write_text(text)
    with pytest.raises(MilanError) as raised:
        read_dictionary(folder)
    assert len(str(raised.value)) < 600


def test_too_large_configuration_is_not_read(tmp_path):
    folder = saelens(tmp_path, common())
    (folder / "cfg.json").write_text('{"a": "' + "x" * 2**24 + '"}')
    with pytest.raises(MilanError, match="too large"):
        read_dictionary(folder)


class Bomb:
    """What creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self):
        return (os.mkdir, (str(self._target),))


@pytest.mark.parametrize("save", [saev, prisma])
def test_hostile_checkpoints_execute_nothing(save, tmp_path):
    target = tmp_path / "executed"
    path = save(tmp_path, {**common(), "hook": Bomb(target)})
    # What cannot be executed is left out; the tensors beside it are read.
    try:
        assert read_dictionary(path).count == FEATURES
    except MilanError as error:
        assert "never executed" in str(error)
    assert not target.exists()


def test_hostile_array_executes_nothing(tmp_path):
    target = tmp_path / "executed"
    np.save(tmp_path / "w.npy", np.array([[Bomb(target)]], dtype=object), allow_pickle=True)
    with pytest.raises(MilanError):
        read_dictionary(tmp_path / "w.npy")
    assert not target.exists()


def test_paths_without_features_say_so(tmp_path):
    with pytest.raises(MilanError, match="there are no features at"):
        read_dictionary(tmp_path / "absent")
    with pytest.raises(MilanError, match="holds no features of a known format"):
        read_dictionary(tmp_path)
    (tmp_path / "text.pt").write_text("{not JSON")
    with pytest.raises(MilanError, match=r"text.pt is damaged or holds more than tensors"):
        read_dictionary(tmp_path / "text.pt")
    for name in FORMATS:
        with pytest.raises(MilanError):
            read_dictionary(tmp_path, ReadingOptions(format=name))


def test_formats_and_options_that_do_nothing_are_refused(tmp_path):
    folder = saelens(tmp_path, common())
    with pytest.raises(MilanError, match="unknown format of features 'saelen'; nearest: saelens"):
        read_dictionary(folder, ReadingOptions(format="saelen"))
    with pytest.raises(MilanError, match="of the format saelens, which has no transposed: leave it out"):
        read_dictionary(folder, ReadingOptions(transposed=False))


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": True},
        {"k": "3"},
        {"scale": "1"},
        {"scale": True},
        {"format": 3},
        {"transposed": "no"},
        {"activation": ["relu"]},
        {"k": 2.5},
        {"width": -1},
        {"threshold": float("nan")},
        {"scale": 0.0},
        {"scale": float("inf")},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(MilanError, match=f"{next(iter(options))} of features is .*: give"):
        ReadingOptions(**options)


def test_several_dictionaries_in_a_file_are_not_chosen_from(tmp_path):
    torch.save({"a": common(), "b": common()}, tmp_path / "weights.pt")
    options = ReadingOptions("prisma", activation="relu", normalisation="none")
    with pytest.raises(MilanError, match=r"hold several dictionaries .a, b.: save one of them alone"):
        read_dictionary(tmp_path / "weights.pt", options)
