from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.registry import RANDOM, register_model
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import WeightsFile


@pytest.fixture(autouse=True)
def registered() -> None:
    register_model("tiny/mine", lambda weights: nn.Linear(2, 2), ["a", "b"])


def test_resolve_wrong_name_gives_the_nearest() -> None:
    with pytest.raises(MilanError, match=r"unknown model 'tinny/mine'; nearest: tiny/mine"):
        resolve_model("tinny/mine")


def test_resolve_user_choices_are_applied_in_order_without_doubles(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    spec = resolve_model("tiny/mine", str(tmp_path / "w.pth"), ["z", "y", "z"])
    assert (spec.layers, spec.weights) == (("z", "y"), str(tmp_path / "w.pth"))
    spec = resolve_model("tiny/mine")
    assert (spec.layers, spec.weights) == (("a", "b"), None)


def test_resolve_relative_weights_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    assert resolve_model("tiny/mine", "w.pth").weights == str(tmp_path / "w.pth")


def test_resolve_missing_weights_file_is_one_sentence() -> None:
    with pytest.raises(MilanError, match=r"no weights file at .*/absent\.pth for tiny/mine"):
        resolve_model("tiny/mine", "absent.pth")


def test_resolve_random_weights_are_passed_to_the_factory() -> None:
    assert resolve_model("tiny/mine", RANDOM).weights == RANDOM


def test_load_gives_an_eval_model_without_gradients() -> None:
    model = resolve_model("tiny/mine").load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(torch.zeros(1, 2)).grad_fn is None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of ``a/model.pth`` and ``b/model.pth`` on this machine."""
    for name in ("a", "b"):
        (tmp_path / "site" / name).mkdir(parents=True)
        for file in ("model.pth", f"model-{hashlib.sha256(name.encode()).hexdigest()[:8]}.pth"):
            (tmp_path / "site" / name / file).write_text(name)
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def test_resolve_addresses_with_one_file_name_are_two_files(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    found = [resolve_model("tiny/mine", f"{server}/{name}/model.pth").weights for name in ("a", "b")]
    assert [Path(path or "").read_text() for path in found] == ["a", "b"]
    assert WeightsFile.at("https://example.org/a/model.safetensors?download=true").file == "model.safetensors"


def test_plain_http_without_a_digest_is_warned_about_once(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    named = f"{server}/a/model-{hashlib.sha256(b'a').hexdigest()[:8]}.pth"
    assert Path(resolve_model("tiny/mine", named).weights or "").read_text() == "a"
    assert "without encryption" not in capfd.readouterr().err
    for warned in (True, False):
        resolve_model("tiny/mine", f"{server}/a/model.pth#ema")
        assert ("without encryption" in capfd.readouterr().err) == warned


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "file://localhost{path}", "FILE:{path}"])
def test_local_weights_are_used_where_they_are(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    path = tmp_path / "my weights#1.pth"
    path.touch()
    assert resolve_model("tiny/mine", form.format(path=path)).weights == str(path)
    assert resolve_model("tiny/mine", form.format(path=f"{path}#ema")).weights == f"{path}#ema"
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/w.pth", "are fetched by https or http, not by ftp"),
        ("s3://bucket/w.pth", "are fetched by https or http, not by s3"),
        ("file://other/w.pth", "is a file of the computer other"),
        ("file:///nowhere/w.pth", "no weights file at /nowhere/w.pth for tiny/mine"),
    ],
)
def test_other_addresses_are_one_sentence(address: str, words: str) -> None:
    with pytest.raises(MilanError, match=words):
        resolve_model("tiny/mine", address)
