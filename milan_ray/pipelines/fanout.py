"""Plain functions over many items, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import wraps
from typing import Any, TypeVar

import ray

from milan_ray.pipelines.cluster import start
from milan_ray.progress import say
from milan_ray.storage import WorkGone

Item = TypeVar("Item")
Result = TypeVar("Result")


FEW_IMAGES = 4096
"""A probe of no more images is merged, and its views are stored, by the driver: workers take longer to start."""

FEW_ROWS = 2**14
"""A job of no more exemplars or candidates is taken apart and put together by the driver, for the same reason."""

MOST_THREADS = 8
"""Threads of the driver that work at once: each may hold a layer's state."""


def beside_others(stage: Callable[..., Result]) -> Callable[..., Result]:
    """A stage that another job on the same storage may run at the same time.

    Whoever is done first removes the work in progress of both. The other then looks again at what is missing, which is
    as a rule nothing.
    """

    @wraps(stage)
    def settled(*arguments: Any, **named: Any) -> Result:
        for _ in range(2):
            try:
                return stage(*arguments, **named)
            except WorkGone:
                say("another job on this storage has finished the same work; looking what is left")
        return stage(*arguments, **named)

    return settled


def run_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_cpus: float = 1,
    num_gpus: float = 0,
    here: bool = False,
) -> Iterator[tuple[int, Result]]:
    """Runs a function on every item as Ray tasks; a task whose worker or node dies is run again.

    Args:
        function: A picklable function of one item.
        items: Its arguments.
        num_cpus: CPUs per call.
        num_gpus: GPUs per call.
        here: Whether threads of this process do it instead, for what is done before Ray has started a worker.

    Yields:
        (index of the item, result), as they finish.

    Raises:
        Exception: What the function raised, as the function raised it.
    """
    if here:
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            futures = {threads.submit(function, item): index for index, item in enumerate(items)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        return
    start()
    remote: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)(function)
    pending = {remote.remote(item): index for index, item in enumerate(items)}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        for reference in done:
            index = pending.pop(reference)
            try:
                yield index, ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
