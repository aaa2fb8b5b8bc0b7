"""Joining a Ray cluster, or starting a local one of our own."""

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
from milan_ray.config import Resources, models_dir
from milan_ray.engine import reaper
from milan_ray.errors import MilanError
from milan_ray.progress import say

LOCAL_OBJECT_STORE = 512 * 2**20
"""Bytes. Stages pass names of files and manifest rows through it, never images or features."""

ROWS_PER_NEW_ACTOR = 4
"""Pieces of work for which one more actor is asked of a cluster that grows: fewer are done before a node is up."""


AUTO_CONNECT = "RAY_ENABLE_AUTO_CONNECT"
"""Environment variable: 0 keeps Ray from starting by itself, with a dashboard and open to other machines."""

REMARK = b"Set ray log level from environment variable"

STARTS = 3
"""How often a local Ray is started before a job gives up: Ray allows it 30 s, which a busy machine may exceed."""

FEW_PIECES = 32
"""Pieces of work that threads of the driver do on a laptop: see :func:`threads_here`."""


@dataclass
class _Own:
    """A local Ray of our own, started when something needs it.

    Attributes:
        wanted: Whether jobs run on one.
        options: What to start it with, until it runs.
        reaper: Process that ends what is left of it when this one is gone.
    """

    wanted: bool = False
    options: dict[str, Any] | None = None
    reaper: subprocess.Popen[bytes] | None = None


_own = _Own()


@dataclass(frozen=True)
class PoolSize:
    """Size of an actor pool.

    Attributes:
        least: Actors that the cluster is asked for, new nodes included where it grows.
        most: Actors at most, as nodes join during the work.
        gpus: GPUs of each.
    """

    least: int
    most: int
    gpus: float


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Connects to the cluster for the time of a job; a local one ends with it.

    A session that is already connected (a notebook, a test) is used as it is and left alone.

    Raises:
        MilanError: The cluster cannot be reached.
    """
    if ray.is_initialized() or _own.wanted:
        yield
        return
    if not sys.warnoptions:  # they speak to those who call Ray; it asks for them by the same rule
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
                "object_store_memory": LOCAL_OBJECT_STORE,
            }
        else:
            # Workers of a cluster that others started know nothing of this process's environment.
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


def start() -> None:
    """Starts the local Ray of :func:`connected` where nothing has yet: small jobs never do."""
    if _own.options is not None and not ray.is_initialized():
        _start_local(_own.options)
        _own.options = None
    _quiet()


def found() -> dict[str, float]:
    """What the cluster has, by name; starts it."""
    start()
    return dict(ray.cluster_resources())


def _start_local(options: dict[str, Any]) -> None:
    """Starts a Ray of our own; one that did not come up in time is given up for another."""
    with _reaped():
        _start_in_time(options)


@contextlib.contextmanager
def _reaped() -> Iterator[None]:
    """Marks the processes that are started meanwhile, and starts the one that ends them when this one is killed."""
    if not Path(reaper.PROC, "self/environ").exists():
        yield
        return
    value = uuid.uuid4().hex
    # In a session of its own, so that nothing that ends this process's group ends it as well.
    command = [sys.executable, "-I", "-S", reaper.__file__, value, str(os.getpid())]
    _own.reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    # Ray's processes name themselves, by default in the place of their environment; this keeps it readable.
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
    """Ends the reaper, and with it what Ray's own end has left."""
    ending, _own.reaper = _own.reaper, None
    if ending is not None:
        assert ending.stdin is not None
        ending.stdin.close()
        ending.wait()


def _start_in_time(options: dict[str, Any]) -> None:
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
    except Exception as error:  # Ray also raises bare exceptions, as where a busy machine takes too long to start one
        raise MilanError(f"cannot reach the Ray cluster at {address}: {error}") from error


@contextlib.contextmanager
def _without_remark() -> Iterator[None]:
    """Keeps a remark of Ray's native core, which no setting silences, off standard error; all else is passed on."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            for line in said:
                if REMARK not in line:
                    os.write(2, line)


def _knock(address: str) -> None:
    """Finds out in seconds whether anybody listens at host:port; Ray itself tries for many minutes.

    Raises:
        MilanError: Nobody does.
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
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def gpus_each(resources: Resources) -> float:
    """GPUs of each actor: what the user asked for, else one where the cluster has GPUs and they are wanted."""
    if resources.gpus_per_actor is not None:
        return resources.gpus_per_actor
    if resources.device == "cpu":
        return 0.0
    start()
    wanted = ray.cluster_resources().get("GPU", 0) >= 1
    return 1.0 if wanted else 0.0


def threads_here(resources: Resources, rows: int) -> int:
    """How many threads of this process do a job; 0 where a pool of actors does it.

    Threads do jobs of few pieces on a local Ray of our own without a GPU, unless the user asked for actors: for what
    takes seconds, starting processes that import torch and Ray Data takes longer than the work.
    """
    small = _own.wanted and rows <= FEW_PIECES and resources.actors is None and not resources.gpus_per_actor
    if not small or (resources.device != "cpu" and torch.cuda.is_available()):
        return 0
    return max(1, min(rows, int(len(os.sched_getaffinity(0)) / resources.cpus_per_actor)))


def pool_size(resources: Resources, rows: int) -> PoolSize:
    """How many actors a pool gets, and how many GPUs each.

    Args:
        resources: What the user allows.
        rows: Pieces of work: more actors than that would idle.

    Raises:
        MilanError: Not one actor fits the cluster.
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
    # Ray Data grows a pool only into nodes that are there; nodes that are not are started for its least size alone.
    least = min(most, max(fits, math.ceil(rows / ROWS_PER_NEW_ACTOR)))
    return PoolSize(least, most, gpus)
