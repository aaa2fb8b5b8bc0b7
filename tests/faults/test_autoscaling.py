"""A cluster of spot nodes that grows with the work and shrinks after it: Ray's autoscaler on fake nodes.

The autoscaler is that of `ray up`. With the one before it, Ray Data knew no kinds of nodes of which there was none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from gates import wait_until
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.schema import EXEMPLARS, LEVELS, VIEWS
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/slow_models.py")
RAY = Path(sys.executable).with_name("ray")
ATTEMPTS = 3

LAYER = {"model": "slow/other", "layer": "3"}

COPIES, BATCH = 20, 16
"""Of each photograph; photographs per pass, as elastic.py says."""

linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def fake_cluster(gcs: str) -> dict[str, object]:
    """As `cluster.yaml`: a head without work, workers of two kinds, from none to some that go when they are idle.

    A node with a GPU has no CPU that its actor does not take, so that others have to read.
    """
    kinds = {"gpu-worker": {"CPU": 1, "GPU": 1}, "cpu-worker": {"CPU": 1}}
    workers = {
        name: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2}
        for name, resources in kinds.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,  # longer than a node is up before its actor is given to it
        "provider": {
            "type": "external",  # its own type has defaults in a file that wheels lack
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "head_node_id": FAKE_HEAD_NODE_ID,
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
            **workers,
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


def start_head(folder: Path, ip: str, environment: dict[str, str], memory: int) -> tuple[str, subprocess.Popen[bytes]]:
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
            "--object-store-memory": memory,
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


@contextmanager
def elastic(tmp_path: Path, memory: int = 100 * 2**20) -> Iterator[Callable[..., dict[str, Any]]]:
    """A head; gives a function that runs `elastic.py` on it, and returns what happened."""
    from ray.util import get_node_ip_address

    folder = Path(tempfile.mkdtemp(prefix="ray"))  # sockets' paths must be short
    alien = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_BACKEND_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in alien}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e" * 64, "HOME": str(folder)}
    environment |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
    # Workers' processes come from the head's, and the driver's passes do not count.
    environment |= {f"MILAN_TEST_{name.upper()}": str(tmp_path / name) for name in ("where", "read", "gate")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"

    def run(how: str, photos: Path, timeout: float) -> dict[str, Any]:
        arguments = [how, address, str(tmp_path / "result"), str(tmp_path / "run"), str(photos), PLUGIN]
        script = str(ROOT / "tests/faults/elastic.py")
        done = subprocess.run(
            [sys.executable, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads((tmp_path / "result").read_text())
        assert not found["failed"], found
        return found

    address, head = start_head(folder, get_node_ip_address(), environment, memory)
    try:
        yield run
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)


@linux
@pytest.mark.slow
def test_cluster_gets_nodes_of_both_kinds_loses_some_gets_others_and_shrinks_again(job, undisturbed, tmp_path):
    """Tables are those of an undisturbed job, for two networks that share what is read."""
    with elastic(tmp_path) as run:
        found = run("once", job.photos, 900)
    assert len(found["ran"]) == 3 and found["lost"] in found["ran"]
    assert found["readers"] and not set(found["readers"]) & set(found["ran"])
    tables = job.tables(Storage(tmp_path / "run"))
    compared = set()
    for name, table in undisturbed.items():
        if name.split()[0] in (EXEMPLARS.name, LEVELS.name, VIEWS.name):
            assert tables[name].equals(table), name
            compared.add(of_other := name.replace("slow/cnn", "slow/other"))
            if of_other in tables and of_other != name:
                assert tables[of_other].drop_columns("model").equals(table.drop_columns("model")), name
    assert {f"{table.name} {LAYER}" for table in (EXEMPLARS, LEVELS)} <= compared & tables.keys()


@linux
@pytest.mark.slow
@pytest.mark.skipif("MILAN_SOAK" not in os.environ, reason="takes ten minutes: make soak")
def test_node_lost_every_20_seconds_costs_little_work(shared, tmp_path):
    """Each photograph of ImageNet's sample many times, read and shown to two networks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in (shared / "data/images/imagenet_sample_1000").glob("*.JPEG"):
        for copy in range(COPIES):
            shutil.copy(photo, folder / f"{photo.stem}-{copy}.JPEG")  # a link would be the same image
    images = len(list(folder.iterdir()))
    (tmp_path / "gate").touch()  # nobody waits
    with elastic(tmp_path, 400 * 2**20) as run:
        found = run("every", folder, 3000)
    passes, read = len((tmp_path / "where").read_text().split()), (tmp_path / "read").read_text().split()
    needed = 2 * images / BATCH  # of two networks
    work = {"passes": passes / needed, "read": sum(map(int, read)) / images}
    print(json.dumps({**found, **work, "images": images}))
    expected = Storage(tmp_path / "undisturbed")
    models = [ModelRef(f"slow/large-{name}", plugins=(PLUGIN,)) for name in ("cnn", "other")]
    config = ExemplarConfig(k=4, batch_size=BATCH, shard_size=256)
    with connected(Resources()):
        Exemplars(models, ProbeRef((str(folder),)), config).run(expected, Resources(actors=2))
    there = Storage(tmp_path / "run")
    for table in (EXEMPLARS, LEVELS):
        for keys in expected.partitions(table):
            assert there.read(table, **keys).equals(expected.read(table, **keys)), keys
    assert sum(found["lost"].values()) >= 5 and max(work.values()) <= 1.15
