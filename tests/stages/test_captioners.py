"""Where captioners are found: trained ones, folders, files, and the published ones."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.errors import MilanError
from milan_ray.stages import captioners


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> str:
    """The published files' address, where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(captioners, "HOST", address)
    return address


def test_milan_keys_are_the_reference_s_with_an_address_each() -> None:
    assert captioners.HOST == "http://milan.csail.mit.edu/models"
    assert len(set(captioners.MILAN)) == 14


@pytest.mark.parametrize("name", ["milan-base.pth", "base.pth"])
def test_milan_file_in_the_models_directory_is_found_under_either_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    (tmp_path / name).touch()
    assert captioners.find_milan("base") == str(tmp_path / name)


def test_milan_absent_file_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    (tmp_path / "milan-not-biggan-imagenet.pth").write_bytes(b"content")
    monkeypatch.setattr(captioners, "HOST", tmp_path.as_uri())
    found = Path(captioners.find_milan("not-biggan/imagenet"))
    assert found == tmp_path / "models/milan-not-biggan-imagenet.pth" and found.read_bytes() == b"content"


def test_milan_without_network_is_one_sentence_with_file_address_and_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    plugin = str(Path(__file__).parents[1] / "plugins/tiny_models.py")
    arguments = ["--model", "tiny/cnn", "--plugin", plugin, "--probe", str(photos), "--storage", str(tmp_path / "run")]
    assert cli.main(["describe", *arguments, "--milan", "cls"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for part in ("milan-cls.pth", str(tmp_path), "$MILAN_MODELS_DIR", f"{offline}/milan-cls.pth"):
        assert part in error


def test_milan_with_clip_says_who_re_ranks() -> None:
    with pytest.raises(MilanError, match=r"'base\+clip' is 'base' re-ranked by CLIP, which only jobs.describe .* do"):
        captioners.find_milan("base+clip")
    with pytest.raises(MilanError, match="re-ranked by CLIP"):
        captioners.load_captioner(None, "not-biggan/imagenet+clip")


def test_milan_wrong_key_answers_with_the_nearest() -> None:
    with pytest.raises(MilanError, match=r"unknown published captioner 'bas'; nearest: base"):
        captioners.find_milan("bas")


def test_milan_and_decoder_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["describe", "--model", "m", "--probe", "p", "--milan", "base", "--decoder", "mine"])
    assert "not allowed with" in capsys.readouterr().err


def test_parity_milan_published_file_is_a_captioner(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    shutil.copy(golden / "milan-toy.pth", tmp_path / "milan-gen.pth")
    file = captioners.load_captioner(None, os.fspath(golden / "milan-toy.pth"))
    assert captioners.load_captioner(None, "gen").indexer == file.indexer


def test_captioner_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"no captioner 'nobody': .* are not in folder .*nobody; train one"):
        captioners.load_captioner(None, "nobody")
