"""Runs a function on many items in parallel, as Ray tasks or threads; retries what another job disturbed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import ray

from milan_ray.engine.cluster import start
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.storage import WorkRemovedError

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = TypeVar("Task")

AHEAD = 4
"""Tasks submitted per task that can run: enough that none waits for the driver, and that an autoscaler sees a need."""

FEW_IMAGES = 4096
"""Images of a probe up to which the driver merges it and stores its views: workers take longer to start."""

FEW_ROWS = 2**14
"""Exemplars or candidates of a job up to which the driver scatters and merges them, for the same reason."""

MOST_THREADS = 8
"""Threads of the driver that work at once: each may hold a layer's state."""


def retry_if_overtaken(stage: Callable[..., Result]) -> Callable[..., Result]:
    """Retries a stage whose intermediate files another job removed.

    Two jobs on one storage may run the same stage at the same time. The first to finish removes the work in progress of
    both; the other then checks for remaining work, and usually finds none.
    """

    @wraps(stage)
    def retried(*arguments: Any, **named: Any) -> Result:
        for _ in range(2):
            try:
                return stage(*arguments, **named)
            except WorkRemovedError:
                say("another job on this storage has finished the same work; checking for remaining work")
        return stage(*arguments, **named)

    return retried


def models_apart(
    run: Callable[[dict[str, Sequence[str]]], object], models: Mapping[str, Sequence[str]], failed: dict[str, str]
) -> dict[str, Sequence[str]]:
    """Runs stages over models, and runs them again without a model when one of its tables is damaged.

    The tables that the other models finished before are up to date in the next run.

    Args:
        run: Runs the stages over some models: name → layers.
        models: All models: name → layers.
        failed: Model → why it failed; models with damaged tables are added.

    Returns:
        The models that succeeded.

    Raises:
        DamagedTable: A table that belongs to no model is damaged.
        MilanError: All models failed.
    """
    left = dict(models)
    while True:
        try:
            run(left)
            return left
        except DamagedTable as error:
            if error.model is None or error.model not in left:
                raise
            del left[error.model]
            failed[error.model] = str(error)
            if not left:
                raise MilanError("; ".join(dict.fromkeys(failed.values()))) from error
            say(f"{error.model} fails, the others go on: {error}", level="warning")


def in_flight(
    items: Iterable[Item],
    limit: Callable[[], int],
    submit: Callable[[Item], Task],
    wait: Callable[[list[Task]], Iterable[Task]],
) -> Iterator[tuple[int, Task]]:
    """Submits items while earlier ones finish, so that the time per item does not grow with their number.

    Args:
        items: The items, taken one by one.
        limit: Returns how many tasks may be pending, at least 1; called before each submission.
        submit: Starts an item.
        wait: Returns the finished ones of some tasks, at least one.

    Yields:
        (index of the item, its finished task), as they finish.
    """
    numbered = enumerate(items)
    pending: dict[Task, int] = {}
    while True:
        for index, item in islice(numbered, max(0, limit() - len(pending))):
            pending[submit(item)] = index
        if not pending:
            return
        for task in wait(list(pending)):
            yield pending.pop(task), task


def run_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_cpus: float = 1,
    num_gpus: float = 0,
    in_driver: bool = False,
) -> Iterator[tuple[int, Result]]:
    """Runs a function on every item as Ray tasks; a task whose worker or node dies is run again.

    A few items per call that the cluster can run at once are submitted at a time; the others are not yet taken.

    Args:
        function: A picklable function of one item: a plain one, a method, or a partial of either.
        items: Its arguments; an iterator is read as tasks finish.
        num_cpus: CPUs per call.
        num_gpus: GPUs per call.
        in_driver: Whether threads of this process run the function instead, where workers would take longer to start.

    Yields:
        (index of the item, result), as they finish.

    Raises:
        Exception: The exception that the function raised, unwrapped.
    """
    if in_driver:
        most = min(MOST_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(most) as threads:
            try:
                for index, future in in_flight(
                    items, lambda: AHEAD * most, lambda item: threads.submit(function, item), first_done
                ):
                    yield index, future.result()
            finally:
                threads.shutdown(cancel_futures=True)
        return
    start()
    remote: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)(_plain(function))
    for index, reference in in_flight(
        items,
        lambda: AHEAD * _room(num_cpus, num_gpus),
        remote.remote,
        lambda pending: ray.wait(pending, num_returns=1)[0],
    ):
        try:
            yield index, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def _plain(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """A plain function, which is all that Ray takes, of the same name, which its dashboard shows."""

    def task(item: Item) -> Result:
        return function(item)

    task.__name__ = task.__qualname__ = getattr(function, "func", function).__name__
    return task


def first_done(futures: list[Future[Result]]) -> Iterable[Future[Result]]:
    """Waits for the first of some futures; returns all that are done."""
    return wait(futures, return_when=FIRST_COMPLETED).done


def _room(num_cpus: float, num_gpus: float) -> int:
    """Calls that the cluster, as large as it is now, can run at once; at least 1."""
    resources = ray.cluster_resources()
    rooms = [resources.get(name, 0.0) / each for name, each in (("CPU", num_cpus), ("GPU", num_gpus)) if each]
    return max(1, int(min(rooms, default=resources.get("CPU", 1.0))))
