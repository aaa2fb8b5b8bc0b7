"""Plain functions over many items, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import ray

from milan_ray.engine.cluster import start
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.storage import Storage, WorkRemovedError

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = TypeVar("Task")

AHEAD = 4
"""Tasks submitted per task that can run: enough that none waits for the driver, and that an autoscaler sees a need."""

FEW_IMAGES = 4096
"""A probe of no more images is merged, and its views are stored, by the driver: workers take longer to start."""

FEW_ROWS = 2**14
"""A job of no more exemplars or candidates is taken apart and put together by the driver, for the same reason."""

MOST_THREADS = 8
"""Threads of the driver that work at once: each may hold a layer's state."""


def retry_if_overtaken(stage: Callable[..., Result]) -> Callable[..., Result]:
    """A stage that another job on the same storage may run at the same time.

    Whoever is done first removes the work in progress of both. The other then looks again at what is missing, which is
    as a rule nothing.
    """

    @wraps(stage)
    def settled(*arguments: Any, **named: Any) -> Result:
        for _ in range(2):
            try:
                return stage(*arguments, **named)
            except WorkRemovedError:
                say("another job on this storage has finished the same work; looking what is left")
        return stage(*arguments, **named)

    return settled


def models_apart(
    run: Callable[[dict[str, Sequence[str]]], object], models: Mapping[str, Sequence[str]], failed: dict[str, str]
) -> dict[str, Sequence[str]]:
    """Runs stages over models, again without a model of which a table turns out to be damaged.

    What the others have finished by then is found up to date.

    Args:
        run: Runs the stages over some models: name → layers.
        models: All of them.
        failed: Model → why it failed; those whose tables are damaged are added.

    Returns:
        The models that are done.

    Raises:
        DamagedTable: One is that is about no model.
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


@contextmanager
def removed_if_damaged(storage: Storage, work: str) -> Iterator[None]:
    """Removes work in progress when a table that it reads is damaged: nobody finishes it as it is.

    Args:
        storage: The run directory.
        work: Hash of the work.
    """
    try:
        yield
    except DamagedTable:
        storage.remove_work(work)
        raise


def in_flight(
    items: Iterable[Item],
    limit: Callable[[], int],
    submit: Callable[[Item], Task],
    wait: Callable[[list[Task]], Iterable[Task]],
) -> Iterator[tuple[int, Task]]:
    """Submits items as others are done: the time per item does not grow with their number.

    Args:
        items: What to submit, taken one by one.
        limit: How many may be submitted and not yet done, asked anew each time; at least 1.
        submit: Starts an item.
        wait: Returns those of some tasks that are done, at least one.

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

    A few items per call that the cluster has room for are submitted at a time; the others are not even asked for.

    Args:
        function: A picklable function of one item.
        items: Its arguments; an iterator is read as tasks finish.
        num_cpus: CPUs per call.
        num_gpus: GPUs per call.
        in_driver: Whether threads of this process do it instead, for what is done before Ray has started a worker.

    Yields:
        (index of the item, result), as they finish.

    Raises:
        Exception: What the function raised, as the function raised it.
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
    remote: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)(function)
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


def first_done(futures: list[Future[Result]]) -> Iterable[Future[Result]]:
    """Waits for the first of some futures; returns all that are done."""
    return wait(futures, return_when=FIRST_COMPLETED).done


def _room(num_cpus: float, num_gpus: float) -> int:
    """Calls that the cluster, as large as it is now, can run at once; at least 1."""
    resources = ray.cluster_resources()
    rooms = [resources.get(name, 0.0) / each for name, each in (("CPU", num_cpus), ("GPU", num_gpus)) if each]
    return max(1, int(min(rooms, default=resources.get("CPU", 1.0))))
