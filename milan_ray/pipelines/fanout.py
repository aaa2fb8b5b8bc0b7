"""Plain functions over many items, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], num_cpus: float = 1, num_gpus: float = 0
) -> Iterator[tuple[int, Result]]:
    """Runs a function on every item as Ray tasks; a task whose worker or node dies is run again.

    Args:
        function: A picklable function of one item.
        items: Its arguments.
        num_cpus: CPUs per call.
        num_gpus: GPUs per call.

    Yields:
        (index of the item, result), as they finish.

    Raises:
        Exception: What the function raised, as the function raised it.
    """
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
