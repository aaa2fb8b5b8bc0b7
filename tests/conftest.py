"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import threading

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two OpenMP threads stall each other otherwise

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_ray import runtime

runtime.prepare(None)  # before anything imports Ray

ROOT = Path(__file__).resolve().parents[1]
DEMO = "tests/test_demo.py"
"""The longest of all: ten minutes."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``-n 2``: what shares fixtures stays together."""
    from xdist.scheduler import LoadScopeScheduling

    long = "not slow" not in config.option.markexpr

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if long else group_of(file)  # long tests of a folder share little, and take minutes

    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return ByFixtures(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, the long files go first, so that the processes are done at the same time: the demo, then Ray."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        file = item.nodeid.split("::")[0]
        return file != DEMO, not needs_ray(file)

    if hasattr(config, "workerinput"):
        items.sort(key=place)


def group_of(file: str) -> str:
    """The group of tests that a test file belongs to, by its path below the root: its folder, or those that use Ray.

    One process starts a Ray, whose workers take longer to start than these tests take, and the other has none.
    """
    return "ray" if needs_ray(file) else Path(file).parts[1]


@functools.cache
def needs_ray(file: str) -> bool:
    """Whether tests of a file use the local Ray."""
    return "ray_session" in (ROOT / file).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs beside the checkout; tests that need it skip without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared (real photographs, weights and reference outputs)")
    return path


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs of the genuine reference implementation."""
    return shared / "golden"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it; it starts when the first actor or task does."""
    from milan_ray.config import Resources
    from milan_ray.engine.cluster import connected

    with connected(Resources()):
        yield


def _below(pid: int) -> dict[int, str]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("reads processes from /proc")
    parents, commands = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(path.name)] = (path / "cmdline").read_text()
            except OSError:  # ended meanwhile
                continue
    found = {}
    for child, command in commands.items():
        above = parents[child]
        while above in parents and above != pid:
            above = parents[above]
        if above == pid:
            found[child] = command
    return found


@pytest.fixture(scope="session")
def below() -> Callable[[int], dict[int, str]]:
    """``below(pid)``: the processes that one has started, and those that they have, with their command lines."""
    return _below


@pytest.fixture(scope="session")
def kill_all() -> Callable[[subprocess.Popen[Any]], None]:
    """``kill_all(process)`` ends a job with all that it has started: its workers would else go on for a moment."""

    def kill(process: subprocess.Popen[Any]) -> None:
        for pid in [process.pid, *_below(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    return kill


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 90 small random images of 3 classes, in three sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(90):
        folder = root / f"class {index % 3}"
        folder.mkdir(exist_ok=True)
        size = (24 + index % 3 * 8, 32)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return root


def _files(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """``dry_run(root, VERB, …)``: what a dry run says, table and partition → reason, as text and as JSON alike.

    It ends with 0, and writes nothing into the run directory or beside the models.
    """
    from milan_ray import cli
    from milan_ray.config import models_dir

    def said(root: str, *arguments: str) -> dict[str, str]:
        folders = Path(root), models_dir()
        before = _files(*folders)
        command = [*arguments, "--storage", root, "--dry-run"]
        capsys.readouterr()
        assert cli.main(command) == 0
        *lines, closing = capsys.readouterr().out.splitlines()
        assert cli.main([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert _files(*folders) == before
        assert told["status"] == "done" and len(lines) == len(told["planned"])
        assert "would be made" in closing and closing.endswith("; nothing was done.")
        for line, step in zip(lines, told["planned"], strict=True):
            assert line.startswith(step["table"]) and line.endswith(step["reason"])
        return {" ".join([step["table"], *step["keys"]]): step["reason"] for step in told["planned"]}

    return said


@pytest.fixture(scope="session")
def save_clip() -> Callable[..., str]:
    """Saves a tiny random CLIP or SigLIP: ``save_clip(folder, kind)`` of ``tests/plugins/tiny_clip.py``."""
    return runpy.run_path(str(ROOT / "tests/plugins/tiny_clip.py"))["save_clip"]


@pytest.fixture
def serve_chat() -> Iterator[Callable[[Callable[[dict[str, Any]], dict[str, Any]]], ThreadingHTTPServer]]:
    """Starts language models' servers: ``serve_chat(answer)`` replies to a request by what a function makes of it."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = json.dumps(answer(asked)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.append((http, thread))
        return http

    yield serve
    for http, thread in running:
        http.shutdown()
        http.server_close()
        thread.join()
