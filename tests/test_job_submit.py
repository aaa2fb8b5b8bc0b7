"""`ray job submit` as in the README, against a real running head with token authentication."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gates import wait_until

from milan_ray.schema import EXEMPLARS
from milan_ray.storage import Storage

pytestmark = pytest.mark.slow  # a head of its own, and a driver for every job

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "tests/plugins/tiny_models.py"
RAY = Path(sys.executable).with_name("ray")
WORKING_DIR_LIMIT = 8 * 2**20
"""Bytes, unpacked."""


@dataclass(frozen=True)
class Head:
    """A running head: where jobs are submitted, the environment that may, and the head's own files."""

    address: str
    environment: dict[str, str]
    folder: Path

    def submit(self, *command: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "RAY_AUTH_TOKEN": token or self.environment["RAY_AUTH_TOKEN"]}
        arguments = ["job", "submit", "--address", self.address, "--working-dir", ".", "--", *command]
        return subprocess.run(
            [RAY, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # sockets' paths must be short: not pytest's folder
    gcs, dashboard, agent, grpc, client = free_ports(5)
    foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_BACKEND_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "HOME": str(folder)}
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # where jobs find `python`
    environment |= {"RAY_TMPDIR": str(folder), "OMP_WAIT_POLICY": "passive", "PATH": path}
    options = {
        "--port": gcs,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--dashboard-agent-grpc-port": grpc,
        "--ray-client-server-port": client,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--dashboard-host": "127.0.0.1",
        "--temp-dir": folder,
        "--num-cpus": 3,
        "--object-store-memory": 100 * 2**20,
    }
    command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"{name}={value}" for name, value in options.items()]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_until(lambda: _answers(dashboard), "the head answers", process)
        yield Head(address, environment, folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # all of this head, and of no other; a polite end takes it 15 s
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def exemplars(storage: object, probe: object) -> list[str]:
    arguments = ["python", "-m", "jobs.exemplars", "--model", "tiny/twin", "--plugin", PLUGIN, "--k", "3"]
    return [*arguments, "--probe", str(probe), "--storage", str(storage)]


def test_submitted_job_runs_and_its_log_and_tables_come_back(head, photos, tmp_path):
    done = head.submit(*exemplars(tmp_path / "run", photos))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "exemplars: 1 layers of 1 models" in said and "succeeded" in said
    storage = Storage(tmp_path / "run")
    assert len(storage.read(EXEMPLARS, model="tiny/twin", layer="0")) == 6 * 3
    (package,) = head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (package / "milan_ray/cli/__init__.py").is_file() and not (package / ".venv").exists()
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < WORKING_DIR_LIMIT


def test_submitted_job_that_fails_has_an_exit_status_and_says_why(head, photos):
    done = head.submit(*exemplars("results", photos))
    assert done.returncode != 0
    assert "error: --storage must be an absolute path or a URI inside a submitted job" in done.stdout + done.stderr


def test_submit_without_the_right_token_is_refused(head):
    done = head.submit("true", token="0" * 64)
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
