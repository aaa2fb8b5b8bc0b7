"""Joins a Ray cluster, or starts a local one for this job."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.annotations import RayDeprecationWarning

from milan_ray import runtime
from milan_ray.config import ExemplarConfig, Resources, models_dir
from milan_ray.engine import reaper
from milan_ray.errors import MilanError
from milan_ray.progress import say

LOCAL_OBJECT_STORE = 512 * 2**20
"""Bytes of a local Ray's object store: stages pass file names and manifest rows, never images or features.

With a GPU, images go to the actors through it, and Ray chooses its size: 30 % of the memory.
"""

ROWS_PER_NEW_ACTOR = 4
"""Shards per actor that is requested of a growing cluster: fewer are finished before a new node is up."""


AUTO_CONNECT = "RAY_ENABLE_AUTO_CONNECT"
"""Environment variable: 0 keeps Ray from starting by itself, with a dashboard and reachable by other machines."""

REMARK = b"Set ray log level from environment variable"

STARTS = 3
"""Attempts to start a local Ray: Ray allows each 30 s, which a busy machine may exceed."""

FEW_PIECES = 32
"""Shards up to which threads of the driver run a stage on a laptop: see :func:`threads_here`."""


@dataclass
class _Own:
    """State of the local Ray of this process, which is started when something needs it.

    Attributes:
        wanted: Whether jobs run on a local Ray.
        options: Options to start it with; None once it runs.
        reaper: Process that ends its remaining processes when this process is gone.
    """

    wanted: bool = False
    options: dict[str, Any] | None = None
    reaper: subprocess.Popen[bytes] | None = None


_own = _Own()


@dataclass(frozen=True)
class PoolSize:
    """Size of an actor pool.

    Attributes:
        least: Actors requested of the cluster, which starts nodes for them where it can grow.
        most: Actors at most, as nodes join during the work.
        gpus: GPUs of each actor.
    """

    least: int
    most: int
    gpus: float


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Connects to the cluster for the duration of a job; a local Ray ends with the job.

    A session that is already connected (a notebook, a test) is used as it is and stays connected.

    Raises:
        MilanError: The cluster cannot be reached.
    """
    if ray.is_initialized() or _own.wanted:
        yield
        return
    if not sys.warnoptions:  # these warnings are for callers of Ray, which checks the same condition
        warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    address = runtime.prepare(resources.address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            _own.wanted = True
            os.environ[AUTO_CONNECT] = "0"
            _own.options = {
                **options,
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": None if torch.cuda.is_available() else LOCAL_OBJECT_STORE,
            }
        else:
            # Workers of an existing cluster do not inherit this process's environment.
            environment = {"OMP_WAIT_POLICY": "passive", "MILAN_MODELS_DIR": str(models_dir())}
            _knock(address)
            _init(address, {**options, "address": address, "runtime_env": {"env_vars": environment}})
        yield
    finally:
        _own.wanted, _own.options = False, None
        os.environ.pop(AUTO_CONNECT, None)
        try:
            ray.shutdown()
        finally:
            _dismiss()


@contextlib.contextmanager
def pretended(cpus: int, gpus: int, object_store: int) -> Iterator[None]:
    """A local Ray of this process that believes in as many CPUs and GPUs, whatever there is; for benchmarks.

    Args:
        cpus: CPUs.
        gpus: GPUs.
        object_store: Bytes of its object store.
    """
    runtime.prepare(None)
    options = {"address": "local", "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    _init("local", {**options, "num_cpus": cpus, "num_gpus": gpus, "object_store_memory": object_store})
    try:
        yield
    finally:
        ray.shutdown()


def start() -> None:
    """Starts the local Ray of :func:`connected` unless it runs; small jobs never call this."""
    if _own.options is not None and not ray.is_initialized():
        with _reaped():
            _start_in_time(_own.options)
        _own.options = None
    _quiet()


def cluster_resources() -> dict[str, float]:
    """Starts the cluster and returns its resources by name."""
    start()
    return dict(ray.cluster_resources())


@contextlib.contextmanager
def _reaped() -> Iterator[None]:
    """Starts the reaper, and marks the processes started in the body, which it ends when this process is killed."""
    if not Path(reaper.PROC, "self/environ").exists():
        yield
        return
    value = uuid.uuid4().hex
    # In its own session, so that a signal to this process's group does not end it too.
    command = [sys.executable, "-I", "-S", reaper.__file__, value, str(os.getpid())]
    _own.reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    # Ray's processes write their title over their environment by default; SPT_NOENV keeps it readable.
    marks = {reaper.VARIABLE: value, "SPT_NOENV": "1"}
    before = {name: os.environ.get(name) for name in marks}
    os.environ.update(marks)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def _dismiss() -> None:
    """Closes the reaper's pipe, upon which it ends the processes that Ray's shutdown left, and waits for it."""
    process, _own.reaper = _own.reaper, None
    if process is not None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _start_in_time(options: dict[str, Any]) -> None:
    """Starts a local Ray, and another one when it does not come up in time."""
    for left in reversed(range(STARTS)):
        try:
            return _init("local", options)
        except MilanError as error:
            if not left:
                raise
            ray.shutdown()
            say(f"{error} Starting another one.", level="warning")


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        with _without_remark():
            ray.init(**options)
    except Exception as error:  # Ray also raises bare exceptions, e.g. when a busy machine takes too long to start
        raise MilanError(f"cannot reach the Ray cluster at {address}: {error}") from error


@contextlib.contextmanager
def _without_remark() -> Iterator[None]:
    """Filters a remark of Ray's native core, which no setting silences, from standard error."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            output.seek(0)
            for line in output:
                if REMARK not in line:
                    os.write(2, line)


def _knock(address: str) -> None:
    """Checks within seconds that something listens at host:port; Ray itself would try for many minutes.

    Raises:
        MilanError: Nothing does.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise MilanError(
            f"cannot reach the Ray cluster at {address}: {error}; check --address and RAY_ADDRESS."
        ) from error


def _quiet() -> None:
    """Turns off Ray's progress bars and informational logs in this process."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def on_gpus(resources: Resources) -> bool:
    """Whether actors hold GPUs: as the user says, else where there are some and the device is not the CPU.

    A local Ray is not started for that.
    """
    if resources.gpus_per_actor is not None:
        return resources.gpus_per_actor > 0
    if resources.device == "cpu":
        return False
    if not ray.is_initialized():
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def sized_for(resources: Resources, config: ExemplarConfig, images: int) -> ExemplarConfig:
    """The configuration with shards of a size for the actors' devices, which never changes a result.

    Args:
        resources: What the actors may use.
        config: The configuration.
        images: Images of the probe.
    """
    return config.for_gpus(images) if on_gpus(resources) else config


def gpus_each(resources: Resources) -> float:
    """GPUs of each actor: the user's number, else one where actors hold GPUs."""
    return float(on_gpus(resources)) if resources.gpus_per_actor is None else resources.gpus_per_actor


def decoders(threads: int, device: torch.device) -> int:
    """Threads of this worker that read and decode images.

    Args:
        threads: Its torch threads: as many without a GPU, which decodes no faster than the model runs.
        device: The device of its model; where it is a GPU, the share of the cluster's CPUs that the GPU has.
    """
    if device.type != "cuda" or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return threads
    total, own = ray.cluster_resources(), ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
    return max(threads, int(total.get("CPU", 0) * own / max(total.get("GPU", 0), own)))


def threads_here(resources: Resources, rows: int) -> int:
    """Threads of this process that run a stage; 0 where a pool of actors runs it.

    Threads run stages of few shards on a local Ray without a GPU, unless the user asked for actors: starting processes
    that import torch and Ray Data takes longer than a few seconds of work.
    """
    small = _own.wanted and rows <= FEW_PIECES and resources.actors is None and not resources.gpus_per_actor
    if not small or (resources.device != "cpu" and torch.cuda.is_available()):
        return 0
    return max(1, min(rows, int(len(os.sched_getaffinity(0)) / resources.cpus_per_actor)))


def pool_size(resources: Resources, rows: int) -> PoolSize:
    """Number of actors of a pool, and GPUs of each.

    Args:
        resources: The part of the cluster that the user allows.
        rows: Shards: more actors than that would idle.

    Raises:
        MilanError: The cluster is too small for one actor.
    """
    start()
    total = ray.cluster_resources()
    gpus = gpus_each(resources)
    fits = int(total.get("CPU", 0) // resources.cpus_per_actor)
    if gpus:
        fits = min(fits, int(total.get("GPU", 0) / gpus))
    most = min(resources.actors or fits, rows)
    if most < 1:
        raise MilanError(
            f"no actor with {resources.cpus_per_actor:g} CPUs and {gpus:g} GPUs fits the cluster "
            f"({total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs); lower --cpus-per-actor or "
            "--gpus-per-actor, or give --actors on a cluster that grows."
        )
    # Ray Data grows a pool only into existing nodes; new nodes are started only for the least size.
    least = min(most, max(fits, math.ceil(rows / ROWS_PER_NEW_ACTOR)))
    return PoolSize(least, most, gpus)


def cpus_when_fed(resources: Resources, size: PoolSize) -> float | None:
    """CPUs of each actor with a GPU whose images tasks read: one at most, so that the others are left for the tasks.

    Returns:
        The CPUs; None where actors have to read for themselves: where they hold no GPUs, and where the cluster has GPUs
        for them and no CPU beyond theirs. One that has no GPU yet gets its CPUs with them.
    """
    if not size.gpus:
        return None
    each, total = min(1.0, resources.cpus_per_actor), ray.cluster_resources()
    actors = min(size.least, int(total.get("GPU", 0) / size.gpus))
    return None if actors and total.get("CPU", 0) - actors * each < 1 else each
