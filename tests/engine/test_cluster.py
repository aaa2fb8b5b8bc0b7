"""Joining and starting Ray: pools that fit, a local Ray that only this machine can reach and that ends with its job."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from gates import wait_until

from milan_ray.config import Resources
from milan_ray.engine.cluster import PoolSize, connected, cpus_when_fed, pool_size, start
from milan_ray.errors import MilanError

PROC = Path("/proc")
LISTENING = "0A"

linux = pytest.mark.skipif(not (PROC / "net/tcp").exists(), reason="reads the sockets of processes from /proc")

LOCAL_RAY = """
import sys
from milan_ray import runtime
runtime.prepare(None)
import ray
from milan_ray.config import Resources
from milan_ray.engine.cluster import connected, start
with connected(Resources()):
    start()
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print("up", flush=True)
    sys.stdin.readline()
print("down", flush=True)
sys.stdin.readline()
"""

STOPPED_RAY = f"""
import os, signal
from milan_ray import runtime
runtime.prepare(None)
from ray._private import services
start_raylet = services.start_raylet
def start_and_stop(*arguments, **options):
    services.start_raylet = start_raylet
    started = start_raylet(*arguments, **options)
    os.kill(started.process.pid, signal.SIGSTOP)
    return started
services.start_raylet = start_and_stop
{LOCAL_RAY}
"""


def listening(pids: list[int]) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """The (address, port) pairs on which processes accept TCP connections."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes |= {os.readlink(handle) for handle in (PROC / str(pid) / "fd").iterdir()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENING and f"socket:[{rest[5]}]" in inodes:
                address, port = local.split(":")
                # Words of four bytes in the machine's own order.
                words = [bytes.fromhex(address[i : i + 8]) for i in range(0, len(address), 8)]
                packed = b"".join(w[::-1] if sys.byteorder == "little" else w for w in words)
                found.append((ipaddress.ip_address(packed), int(port, 16)))
    return found


def is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)  # not seen through by is_loopback before Python 3.13
    return (mapped or address).is_loopback


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def assert_ended(pids: list[int]) -> None:
    wait_until(lambda: not alive(pids), "all these processes have ended")


def local_ray_process(script: str = LOCAL_RAY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


@pytest.fixture
def local_ray(below):
    """A process of its own with a local Ray of ours in it, up."""
    process = local_ray_process()
    started: list[int] = []
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line == "up\n", process.stderr.read()
        started = list(below(process.pid))
        yield process, started
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate("\n\n", timeout=60)
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)


@linux
@pytest.mark.slow
def test_connected_local_ray_listens_on_loopback_alone_and_ends_with_its_job(local_ray):
    process, started = local_ray
    commands = [(PROC / str(pid) / "cmdline").read_text() for pid in started]
    assert any("raylet" in command for command in commands)
    sockets = listening([process.pid, *started])
    assert len(sockets) >= 3
    assert [where for where in sockets if not is_loopback(where[0])] == []
    assert 8265 not in {port for _, port in sockets}
    # What Ray starts in its place reports usage statistics (or nothing) and serves no pages.
    assert all("--disable-frontend" in command for command in commands if "dashboard.py" in command)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "down\n"
    assert_ended(started)
    assert process.poll() is None


@linux
@pytest.mark.slow
def test_connected_local_ray_ends_when_its_job_is_terminated(local_ray):
    process, started = local_ray
    process.terminate()
    process.wait(60)
    assert_ended(started)


BUSY_RAY = """
import subprocess, sys
from milan_ray import runtime
runtime.prepare(None)
import ray
from milan_ray.config import Resources
from milan_ray.engine.cluster import connected, start
def work():
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid
with connected(Resources()):
    start()
    print(ray.get(ray.remote(work).remote()), flush=True)
    sys.stdin.readline()
sys.stdin.readline()
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_local_ray_and_all_that_it_started_end_with_its_driver(below, killed):
    """Also what Ray itself would leave: a process that a task has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY_RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert process.stdin is not None and process.stdout is not None
    asleep = int(process.stdout.readline())
    started = [asleep, *below(process.pid)]
    try:
        assert alive([asleep]) and len(started) > 5
        if killed:
            process.kill()
            process.wait(60)
        else:
            process.stdin.write("\n")
            process.stdin.flush()
        assert_ended(started)
    finally:
        process.kill()
        process.wait(60)
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)


@linux
@pytest.mark.slow
def test_local_ray_that_does_not_come_up_in_time_is_given_up_for_another(below):
    """As on a machine that is too busy: the first raylet is stopped, and Ray gives it up after half a minute."""
    process = local_ray_process(STOPPED_RAY)
    assert process.stdout is not None
    line = process.stdout.readline()
    started = list(below(process.pid))
    said = process.communicate("\n\n", timeout=60)[1]
    assert line == "up\n", said
    assert "timed out during startup" in said and "Starting another one." in said
    assert_ended(started)


def test_connected_inside_a_session_uses_it_and_leaves_it_alone(ray_session):
    start()
    before = ray.get_runtime_context().get_job_id()
    with connected(Resources(address="10.255.255.1:6379")):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()
    with pytest.raises(RuntimeError, match="of the job"), connected(Resources()):
        raise RuntimeError("of the job")
    assert ray.is_initialized()


JOIN = """
from milan_ray.config import Resources
from milan_ray.errors import MilanError
from milan_ray.engine.cluster import connected
try:
    with connected(Resources()):
        print("connected")
except MilanError as error:
    print(error)
"""


def join(address: str, seconds: float) -> str:
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-c", JOIN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=True)
    return done.stdout


@pytest.mark.slow
def test_connected_to_no_address_at_all_is_a_milan_error():
    assert join("not an address", 60).startswith("cannot reach the Ray cluster at not an address: ")


@pytest.mark.slow
def test_connected_to_a_dead_cluster_is_soon_a_milan_error():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    assert join(address, 15).startswith(f"cannot reach the Ray cluster at {address}: ")


PRETENDED_GPUS = """
import json
from milan_ray import runtime
runtime.prepare(None)
import ray, torch
from milan_ray.engine.cluster import decoders
ray.init(num_cpus=16, num_gpus=2, include_dashboard=False)

@ray.remote
class Actor:
    def count(self, threads, device):
        return decoders(threads, torch.device(device))

def count(gpus, *asked):
    actor = Actor.options(num_gpus=gpus, num_cpus=1).remote()
    return ray.get([actor.count.remote(*each) for each in asked])

print(json.dumps([decoders(3, torch.device("cuda")), *count(1, (1, "cuda"), (2, "cpu")),
                  *count(0.5, (1, "cuda"), (6, "cuda"))]))
"""


@pytest.mark.slow
def test_actors_with_a_gpu_decode_with_its_share_of_the_clusters_cpus():
    """Without a GPU, which Ray is made to believe in; in the driver, and on CPUs, with as many threads as torch."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", PRETENDED_GPUS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [3, 8, 2, 4, 6]


# -- pool_size ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cpus(ray_session) -> int:
    start()
    return int(ray.cluster_resources()["CPU"])


def test_pool_size_without_gpus_takes_an_actor_per_cpu(cpus):
    if ray.cluster_resources().get("GPU"):
        pytest.skip("the session has GPUs")
    assert pool_size(Resources(), 1000) == PoolSize(cpus, cpus, 0.0)
    assert pool_size(Resources(cpus_per_actor=cpus), 1000) == PoolSize(1, 1, 0.0)
    assert pool_size(Resources(cpus_per_actor=0.5), 1000) == PoolSize(2 * cpus, 2 * cpus, 0.0)


def test_pool_size_never_exceeds_the_rows(cpus):
    assert pool_size(Resources(gpus_per_actor=0), 1) == PoolSize(1, 1, 0)
    assert pool_size(Resources(gpus_per_actor=0, actors=8), 3).most == 3


@pytest.mark.parametrize(
    ("cluster", "asked", "gpus", "expected"),
    [
        ({"CPU": 8, "GPU": 1}, 8, 1, 1),  # seven are left for tasks
        ({"CPU": 2, "GPU": 1}, 1, 1, 1),
        ({"CPU": 2, "GPU": 1}, 0.5, 0.5, 0.5),
        ({"CPU": 1, "GPU": 1}, 1, 1, None),  # a task would wait for ever
        ({"CPU": 4, "GPU": 4}, 1, 1, None),
        ({"CPU": 4}, 1, 1, 1),  # no GPU yet: its node brings CPUs, or those that are there read
        ({}, 8, 1, 1),
        ({"CPU": 8, "GPU": 1}, 1, 0, None),  # actors on CPUs
    ],
)
def test_actors_that_tasks_read_for_leave_them_cpus_or_read_themselves(monkeypatch, cluster, asked, gpus, expected):
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    size = PoolSize(least=4, most=4, gpus=gpus)
    assert cpus_when_fed(Resources(cpus_per_actor=asked, gpus_per_actor=gpus), size) == expected


def test_pool_size_takes_the_users_number_even_beyond_the_cluster_of_now(cpus):
    assert pool_size(Resources(gpus_per_actor=0, actors=1), 1000) == PoolSize(1, 1, 0)
    assert pool_size(Resources(gpus_per_actor=0, actors=cpus + 5), 1000) == PoolSize(cpus + 5, cpus + 5, 0)
    assert pool_size(Resources(actors=2, gpus_per_actor=1000), 1000) == PoolSize(2, 2, 1000)


def test_pool_size_asks_a_growing_cluster_for_what_the_work_is_worth(cpus):
    rows = 4 * (cpus + 3)
    assert pool_size(Resources(gpus_per_actor=0, actors=100), rows) == PoolSize(cpus + 3, rows, 0)


@pytest.mark.parametrize("change", [{"cpus_per_actor": 10_000}, {"gpus_per_actor": 1000}, {"actors": -1}], ids=str)
def test_pool_size_when_no_actor_fits_says_what_to_change(cpus, change):
    with pytest.raises(MilanError, match="lower --cpus-per-actor or --gpus-per-actor"):
        pool_size(Resources(**change), 10)
