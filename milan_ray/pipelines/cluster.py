"""Joining a Ray cluster, or starting a local one of our own."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import DataContext

from milan_ray import runtime
from milan_ray.config import Resources, models_dir
from milan_ray.errors import MilanError

LOCAL_OBJECT_STORE = 512 * 2**20
"""Bytes. Stages pass names of files and manifest rows through it, never images or features."""

ROWS_PER_NEW_ACTOR = 4
"""Pieces of work for which one more actor is asked of a cluster that grows: fewer are done before a node is up."""


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
    if ray.is_initialized():
        _quiet()
        yield
        return
    address = runtime.prepare(resources.address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE,
        }
    else:
        options["address"] = address
        # Workers of a cluster that others started know nothing of this process's environment.
        options["runtime_env"] = {
            "env_vars": {"OMP_WAIT_POLICY": "passive", "MILAN_MODELS_DIR": str(models_dir())},
        }
        _knock(address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MilanError(f"cannot reach the Ray cluster at {address or 'local'}: {error}") from error
    _quiet()
    try:
        yield
    finally:
        ray.shutdown()


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
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def gpus_each(resources: Resources) -> float:
    """GPUs of each actor: what the user asked for, else one where the cluster has GPUs and they are wanted."""
    if resources.gpus_per_actor is not None:
        return resources.gpus_per_actor
    wanted = resources.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    return 1.0 if wanted else 0.0


def pool_size(resources: Resources, rows: int) -> PoolSize:
    """How many actors a pool gets, and how many GPUs each.

    Args:
        resources: What the user allows.
        rows: Pieces of work: more actors than that would idle.

    Raises:
        MilanError: Not one actor fits the cluster.
    """
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
