"""Plain functions over many items: how many are under way at once, and what comes back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from milan_ray.engine.cluster import cluster_resources
from milan_ray.engine.tasks import AHEAD, MOST_THREADS, in_flight, run_parallel
from milan_ray.errors import MilanError


def counted(items: int, taken: list[int]) -> Iterator[int]:
    """Items one by one, and which of them were taken."""
    for item in range(items):
        taken.append(item)
        yield item


def square(item: int) -> int:
    if item == 77:
        raise MilanError("seventy-seven cannot be squared.")
    return item**2


def most_ahead(items: int, in_driver: bool) -> int:
    """The most items taken and not yet done; every result is checked."""
    taken: list[int] = []
    ahead, results = 0, {}
    for index, result in run_parallel(square, (item + 100 for item in counted(items, taken)), in_driver=in_driver):
        results[index] = result
        ahead = max(ahead, len(taken) - len(results) + 1)
    assert results == {index: (index + 100) ** 2 for index in range(items)}
    return ahead


def test_tasks_on_threads_are_submitted_a_few_at_a_time():
    assert most_ahead(300, in_driver=True) <= AHEAD * min(MOST_THREADS, os.cpu_count() or 1)


@pytest.mark.usefixtures("ray_session")
def test_tasks_on_ray_are_submitted_a_few_at_a_time():
    bound = AHEAD * int(cluster_resources()["CPU"])
    assert most_ahead(2 * bound + 5, in_driver=False) <= bound


def test_tasks_wait_for_others_and_never_for_a_list_of_all():
    waiting: list[int] = []
    limits = iter([2, 2, 5] + [3] * 100)  # a cluster that grows and shrinks
    submitted: list[int] = []

    def submit(item: int) -> int:
        submitted.append(item)
        return item

    def wait(pending: list[int]) -> list[int]:
        waiting.append(len(pending))
        return pending[-1:]

    found = list(in_flight(iter(range(10)), lambda: next(limits), submit, wait))
    assert sorted(found) == [(item, item) for item in range(10)] and submitted == list(range(10))
    assert waiting[:3] == [2, 2, 5] and max(waiting[3:]) <= 4


@pytest.mark.parametrize("in_driver", [True, False])
@pytest.mark.usefixtures("ray_session")
def test_first_error_ends_the_rest_as_it_was_raised(in_driver):
    taken: list[int] = []
    with pytest.raises(MilanError, match="seventy-seven"):
        for _ in run_parallel(square, counted(10_000, taken), in_driver=in_driver):
            pass
    assert len(taken) < 1000


def test_nothing_to_do_starts_nothing(tmp_path: Path):
    assert list(run_parallel(square, iter(()), in_driver=True)) == []
