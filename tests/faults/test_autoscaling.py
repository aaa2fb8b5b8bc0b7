"""A cluster that grows with the work and shrinks after it: Ray's autoscaler on fake nodes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from gates import wait_until

from milan_ray.schema import EXEMPLARS, LEVELS, VIEWS
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/slow_models.py")
RAY = Path(sys.executable).with_name("ray")
ATTEMPTS = 3


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def fake_cluster(gcs: str) -> dict[str, object]:
    """As `cluster.yaml`: a head without work, workers from none to some that go when they are idle."""
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,  # longer than a node is up before its actor is given to it
        "provider": {
            "type": "fake_multinode",
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
            "foreground_node_launch": True,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "gcs_address": gcs,
        },
        "auth": {},
        "docker": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def end(head: subprocess.Popen[bytes]) -> None:
    """Ends a head and its nodes, and no other."""
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def up_or_ended(head: subprocess.Popen[bytes], log: Path) -> bool:
    return "--block" in log.read_text() or head.poll() is not None


def start_head(folder: Path, ip: str, environment: dict[str, str]) -> tuple[str, subprocess.Popen[bytes]]:
    """Starts a head; another one, on other ports, where another process has taken one of them meanwhile.

    Ray also gives up where it is not up in half a minute.
    """
    for attempt in range(ATTEMPTS):
        gcs, client, agent, grpc = free_ports(4)
        config, log = folder / f"cluster-{attempt}.yaml", folder / f"head-{attempt}.log"
        config.write_text(yaml.safe_dump(fake_cluster(f"{ip}:{gcs}")))
        options = {
            "--port": gcs,
            "--ray-client-server-port": client,
            "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": grpc,
            "--num-cpus": 0,
            "--include-dashboard": "false",
            "--autoscaling-config": config,
            "--temp-dir": folder / str(attempt),
            "--object-store-memory": 100 * 2**20,
        }
        command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"{name}={value}" for name, value in options.items()]
        with log.open("w") as stream:
            head = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        wait_until(partial(up_or_ended, head, log), "the head is up or has ended")
        if head.poll() is None:
            return f"{ip}:{gcs}", head
        end(head)
    pytest.fail(f"no head came up: {log.read_text()}")


@pytest.mark.slow
def test_cluster_grows_to_what_the_work_needs_and_shrinks_again(job, undisturbed, tmp_path):
    from ray.util import get_node_ip_address

    folder = Path(tempfile.mkdtemp(prefix="ray"))  # sockets' paths must be short
    alien = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_BACKEND_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in alien}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e" * 64, "HOME": str(folder)}
    environment |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= {"MILAN_TEST_WHERE": str(tmp_path / "where"), "MILAN_TEST_GATE": str(tmp_path / "gate")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"
    address, head = start_head(folder, get_node_ip_address(), environment)
    try:
        arguments = [address, str(tmp_path / "result"), str(tmp_path / "run"), str(job.photos), PLUGIN]
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/faults/autoscaling.py"), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)
    assert json.loads((tmp_path / "result").read_text()) == {"before": 1, "ran": 2, "after": 1}
    found = job.tables(Storage(tmp_path / "run"))
    for name, table in undisturbed.items():
        if name.split()[0] in (EXEMPLARS.name, LEVELS.name, VIEWS.name):
            assert found[name].equals(table), name
