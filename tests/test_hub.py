"""Files found, downloaded and missed, with a real server on this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gates import wait_until

from milan_ray import hub
from milan_ray.errors import MilanError

CONTENT = bytes(range(256)) * 8192 + b"end"  # a little over two steps of the progress bar
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Whole files, files that stop half-way, files of unknown length, and a file that never comes."""

    def do_GET(self) -> None:
        if self.path not in ("/whole.pth", "/half.pth", "/unknown.pth", "/stuck.pth"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unknown.pth":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path in ("/half.pth", "/stuck.pth") else CONTENT)
        if self.path == "/stuck.pth":
            self.wfile.flush()
            self.server.released.wait(30)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on this machine."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.released.set()  # type: ignore[attr-defined]
    running.shutdown()
    thread.join()
    running.server_close()


def test_find_file_in_any_folder_under_any_name_is_taken_in_order(tmp_path: Path) -> None:
    for path in ("b/w.pth", "b/sub/old.pth", "c/w.pth"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert hub.find("w.pth", folders) == tmp_path / "b/w.pth"
    assert hub.find("new.pth", folders, "http://nowhere.invalid/", also=["sub/old.pth"]) == tmp_path / "b/sub/old.pth"


def test_find_relative_folder_gives_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    assert hub.find("w.pth", [Path()]) == tmp_path / "w.pth"


def test_find_absent_file_is_one_sentence_with_name_places_address_and_variable(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(MilanError) as caught:
        hub.find("w.pth", folders, "https://example.org/w.pth", variable="MILAN_MODELS_DIR", hint="or give --weights")
    assert str(caught.value) == (
        f"w.pth is neither in {folders[0]} nor in {folders[1]} (see $MILAN_MODELS_DIR): fetch it from "
        f"https://example.org/w.pth into {folders[0]}, or give --weights."
    )
    with pytest.raises(MilanError, match=rf"^w\.pth or v\.pth is not in {folders[0]}: put it there\.$"):
        hub.find("w.pth", folders[:1], also=["v.pth"], download=True)


@pytest.mark.parametrize("path", ["whole.pth", "unknown.pth"])
def test_find_with_download_fetches_checks_and_keeps_the_file(
    server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    folders = [tmp_path / "new/sub", tmp_path / "other"]
    found = hub.find("w.pth", folders, f"{server}/{path}", download=True, sha256=DIGEST[:8])
    assert found == tmp_path / "new/sub/w.pth" and found.read_bytes() == CONTENT
    assert list(found.parent.iterdir()) == [found]
    assert "downloading" in capfd.readouterr().err
    assert hub.find("w.pth", folders, f"{server}/gone.pth", download=True) == found


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("gone.pth", None, "HTTP Error 404: Not Found"),
        ("half.pth", None, f"only {len(CONTENT) // 2} of {len(CONTENT)} bytes came"),
        ("whole.pth", "0123abcd", f"its sha256 is {DIGEST}, not 0123abcd"),
    ],
)
def test_find_failing_download_says_why_and_leaves_nothing(
    server: str, tmp_path: Path, path: str, sha256: str | None, reason: str
) -> None:
    url = f"{server}/{path}"
    with pytest.raises(MilanError) as caught:
        hub.find("w.pth", [tmp_path / "m"], url, download=True, variable="MILAN_MODELS_DIR", sha256=sha256)
    assert str(caught.value) == (
        f"w.pth is not in {tmp_path / 'm'} (see $MILAN_MODELS_DIR); {url} cannot be downloaded ({reason}): "
        "put it there."
    )
    assert not list((tmp_path / "m").iterdir())


def test_fetch_silent_server_times_out(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    with pytest.raises(MilanError, match="timed out"):
        hub.fetch(f"{server}/stuck.pth", tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())


def test_fetch_without_network_or_scheme_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]  # nobody listens there
    for url in (f"http://127.0.0.1:{closed}/w.pth", "http://host.invalid/w.pth", "nonsense", "ftp2://x/y"):
        with pytest.raises(MilanError, match=rf"^{url} cannot be downloaded \(.+\)$"):
            hub.fetch(url, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())


def test_fetch_into_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "source").write_bytes(CONTENT)
    with pytest.raises(MilanError, match="cannot be downloaded"):
        hub.fetch((tmp_path / "source").as_uri(), tmp_path / "file/sub/w.pth")


def test_fetch_file_address_replaces_the_target_whole(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "w.pth").write_bytes(b"old")
    assert hub.fetch((tmp_path / "source").as_uri(), tmp_path / "w.pth").read_bytes() == CONTENT


def test_fetch_by_many_at_once_gives_everyone_the_whole_file(server: str, tmp_path: Path) -> None:
    def find(_: int) -> bytes:
        return hub.find("w.pth", [tmp_path], f"{server}/whole.pth", download=True, sha256=DIGEST).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(find, range(8))) == {CONTENT}
    assert list(tmp_path.iterdir()) == [tmp_path / "w.pth"]


def test_fetch_interrupted_by_the_user_leaves_nothing(server: str, tmp_path: Path) -> None:
    code = "import sys, pathlib; from milan_ray import hub;hub.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, f"{server}/stuck.pth", str(tmp_path / "m/w.pth")], stderr=subprocess.PIPE
    )
    wait_until(lambda: list(tmp_path.glob("m/.w.pth.*.part")), "the download has begun", running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert b"KeyboardInterrupt" in err
    assert not list((tmp_path / "m").iterdir())


def test_digest_in_reads_what_publishers_put_into_names() -> None:
    assert hub.digest_in("resnet18-f37072fd.pth") == "f37072fd"
    assert hub.digest_in("resnet152_places365-f928166e5c.pth") == "f928166e5c"
    assert hub.digest_in("milan-base.pth") is None


def test_fetch_removes_what_a_killed_download_left_long_ago(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    old, new = tmp_path / ".file.00000000.part", tmp_path / ".file.11111111.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    hub.fetch(source.as_uri(), tmp_path / "file")
    assert not old.exists() and new.exists()
