"""Tasks of the studies: how they are run on the cluster, and how a worker starts one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from milan_ray.config import Resources
from milan_ray.device import resolve_device
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.tasks import run_parallel
from milan_ray.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    resources: Resources,
    label: str,
    unit: str,
    *,
    size: Callable[[Task], int] = lambda task: 1,
    in_driver: bool = False,
) -> Iterator[tuple[int, Result]]:
    """Runs a function on every task in parallel, and shows progress.

    Args:
        function: A picklable function of one task.
        tasks: Its arguments.
        resources: The part of the cluster to use.
        label: Name of the work in progress output.
        unit: Unit of progress.
        size: Size of a task in this unit.
        in_driver: Whether threads of this process run the function, because workers would take longer to start.

    Yields:
        (index of the task, result), as they finish.
    """
    gpus = 0 if in_driver else gpus_each(resources)
    with Progress(label, sum(map(size, tasks)), unit) as progress:
        for index, result in run_parallel(function, tasks, resources.cpus_per_actor, gpus, in_driver):
            yield index, result
            progress.advance(size(tasks[index]))


def worker_device(resources: Resources) -> torch.device:
    """Prepares a worker to compute with its share of the resources; returns its device."""
    torch.set_num_threads(resources.threads)
    return resolve_device(resources.device)
