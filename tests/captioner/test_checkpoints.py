import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import (
    CONFIG,
    WEIGHTS,
    digest,
    from_bytes,
    lm_digest,
    load_reference,
    load_reference_lm,
    read_pickled,
    to_bytes,
)
from milan_ray.errors import MilanError


def test_bytes_round_trip_keeps_every_weight_and_every_answer(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    state = {"conv1.weight": torch.arange(3.0)}
    tiny = Captioner(tiny.indexer, tiny.decoder, tiny.lm, "resnet18", state, length=7, beam_size=4, lam=0.3)
    copy = from_bytes(to_bytes(tiny))
    assert (copy.length, copy.beam_size, copy.lam, copy.encoder_name) == (7, 4, 0.3, "resnet18")
    assert copy.encoder_state is not None and torch.equal(copy.encoder_state["conv1.weight"], state["conv1.weight"])
    assert to_bytes(copy) == to_bytes(tiny)
    assert copy.describe(tiny_features) == tiny.describe(tiny_features)


def test_digest_changes_with_a_weight_and_with_nothing_else(tiny: Captioner) -> None:
    before, lm_before = digest(tiny), lm_digest(tiny)
    assert digest(from_bytes(to_bytes(tiny))) == before
    with torch.no_grad():
        tiny.decoder.output[1].bias[0] += 1
    assert digest(tiny) != before
    assert lm_digest(tiny) == lm_before


def test_from_bytes_without_language_model_has_none(tiny: Captioner) -> None:
    copy = from_bytes(to_bytes(Captioner(tiny.indexer, tiny.decoder, None, "resnet18")))
    assert copy.lm is None and copy.encoder_state is None and lm_digest(copy) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: {CONFIG: files[CONFIG]}, "is missing"),
        (lambda files: {**files, CONFIG: b"{"}, "not a captioner"),
        (lambda files: {**files, WEIGHTS: files[WEIGHTS][:100]}, "not a captioner"),
        (lambda files: {**files, CONFIG: files[CONFIG].replace(b'"format": 1', b'"format": 99')}, "format 99"),
        (
            lambda files: {**files, CONFIG: files[CONFIG].replace(b'"hidden_size": 7', b'"hidden_size": 8')},
            "do not fit",
        ),
    ],
)
def test_from_bytes_damaged_files_are_refused(
    tiny: Captioner, damage: Callable[[dict[str, bytes]], dict[str, bytes]], message: str
) -> None:
    with pytest.raises(MilanError, match=message):
        from_bytes(damage(to_bytes(tiny)))


class Evil:
    """Runs a command wherever it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_load_reference_malicious_file_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    witness, file = tmp_path / "witness", tmp_path / "evil.pth"
    torch.save({"properties": Evil(witness), "state_dict": {}}, file)
    for load in (load_reference, load_reference_lm):
        with pytest.raises(MilanError, match=r"refers to \w+\.system, which no MILAN checkpoint needs"):
            load(file)
    assert not witness.exists()


def test_load_reference_calls_hidden_behind_allowed_names_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    with zipfile.ZipFile(file, "w") as archive:  # BUILD, REDUCE and getattr tricks all need a class first
        archive.writestr("evil/data.pkl", b"cbuiltins\ngetattr\n(cos\nsystem\nVtrue\ntR.")
    with pytest.raises(MilanError, match=r"builtins\.getattr"):
        load_reference(file)


@pytest.mark.parametrize("content", [b"", b"PK not a zip", pickle.dumps({"properties": 1})])
def test_load_reference_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other.pth"
    file.write_bytes(content)
    with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
        load_reference(file)


def test_read_pickled_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"a": torch.arange(5.0), "b": (1, "s", b"\xff")}, whole)
    with zipfile.ZipFile(whole) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for size in range(0, len(content["whole/data.pkl"]), 5):
        with zipfile.ZipFile(cut, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data[:size] if name.endswith("data.pkl") else data)
        with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
            read_pickled(cut)


def test_read_pickled_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(10**9), tmp_path / "bomb.pth")  # stride 0: four bytes that want four gigabytes
    with pytest.raises(MilanError, match="not a checkpoint"):
        read_pickled(tmp_path / "bomb.pth")


def test_load_reference_foreign_state_dict_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(MilanError, match="not a checkpoint of the MILAN reference"):
        load_reference(file)


def test_load_reference_missing_file_says_where(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"cannot read the checkpoint .*absent\.pth"):
        load_reference(tmp_path / "absent.pth")


def test_read_pickled_tensors_and_plain_data_survive(tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    content = {
        "float": shared,
        "view": shared.t()[1:],
        "half": torch.ones(2, dtype=torch.float16),
        "long": torch.tensor(7),
        "empty": torch.zeros(0),
        "plain": (1, 2.5, "ü", None, True, [b"\xff\x00"]),
    }
    torch.save(content, tmp_path / "file.pth")
    read = read_pickled(tmp_path / "file.pth")
    assert read["plain"] == content["plain"]
    for name in ("float", "view", "half", "long", "empty"):
        assert read[name].dtype == content[name].dtype and torch.equal(read[name], content[name])
