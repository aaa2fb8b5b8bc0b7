"""Runs shards on a pool of actors through Ray Data, or on threads: one row is one shard and the unit of retry."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from milan_ray.config import Resources
from milan_ray.device import torch_threads
from milan_ray.engine.cluster import cpus_when_fed, pool_size, start, threads_here
from milan_ray.engine.demand import one_more_cpu
from milan_ray.engine.tasks import AHEAD, first_done, in_flight
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.runtime import freed_memory_kept, keep_freed_memory
from milan_ray.storage import WorkRemovedError

Row = dict[str, Any]

_WAITING = 2
"""Rows submitted to each actor: while one runs, the next one waits."""

WINDOW = 4096
"""Rows of a run of Ray Data: it makes a block of each when it starts, of 10 kB and 5 ms of the driver's time."""


@dataclass(frozen=True)
class Read:
    """What a row's reader has read.

    Attributes:
        facts: JSON-able facts.
        array: An array; in the worker it is read-only, and shared with other processes of the node.
    """

    facts: Row
    array: np.ndarray


def run_pool(
    worker: Callable[..., Any],
    arguments: dict[str, Any],
    rows: list[Row],
    resources: Resources,
    in_driver: bool = False,
    pieces: int | None = None,
    reader: Callable[..., Callable[[Row], Read | None]] | None = None,
) -> Iterator[Row]:
    """Runs ``worker(**arguments)(row)`` for every row on a pool of actors, or on threads where that is faster.

    The caller fixes the composition of the rows, so results never depend on how Ray groups them. The worker writes its
    own files and returns a small row. A row is run again when an actor or node dies, and must then write the same
    files.

    Args:
        worker: A callable class.
        arguments: Constructor arguments of the worker: small, picklable.
        rows: Shards, JSON-able.
        resources: The part of the cluster that the pool may use.
        in_driver: Whether one thread of this process runs the rows in any case.
        pieces: Pieces of work in all rows, where a row has several; None for one each.
        reader: A callable class with the worker's arguments, which reads what a row needs. Where actors hold GPUs, it
            runs in tasks on any CPUs of the cluster, ahead of the actors by as much as Ray's object store holds, and
            ``worker(**arguments)(row, read)`` gets what it has read; an actor then asks for one CPU at most, and leaves
            the others to the tasks. Elsewhere the worker reads for itself: it would wait for the same CPUs.

    Yields:
        The workers' answers (JSON-able), as they finish, with the ``seconds`` that each took and its row's ``name``.

    Raises:
        MilanError: A worker raised it.
    """
    if not rows:
        return
    threads = threads_here(resources, pieces or len(rows)) or int(in_driver)
    answers = (
        _on_threads(worker, arguments, rows, threads)
        if threads
        else _actors(worker, arguments, rows, resources, reader)
    )
    with closing(answers):  # rows that still run have ended when an error is raised, and write nothing after that
        for answer in answers:
            if "failure" in answer:
                raise _to_error(answer)
            yield answer


def _actors(
    worker: Callable[..., Any],
    arguments: dict[str, Any],
    rows: list[Row],
    resources: Resources,
    reader: Callable[..., Callable[[Row], Read | None]] | None,
) -> Generator[Row, None, None]:
    """Runs the rows on actors, a window of them after the other."""
    import ray.data  # two seconds of CPU, which a small job does not pay

    start()
    size = pool_size(resources, len(rows))
    cpus = cpus_when_fed(resources, size) if reader is not None else None
    for first in range(0, len(rows), WINDOW):
        # JSON keeps Ray Data from inferring Arrow types from the first row.
        window = [{"row": json.dumps(row)} for row in rows[first : first + WINDOW]]
        blocks: ray.data.Dataset = ray.data.from_items(window, override_num_blocks=len(window))
        if reader is not None and cpus is not None:
            blocks = blocks.map(_task(reader, arguments), num_cpus=1)
        answers = blocks.map(
            _named(worker),
            fn_constructor_kwargs=arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=size.least, max_size=size.most, max_tasks_in_flight_per_actor=_WAITING
            ),
            num_cpus=resources.cpus_per_actor if cpus is None else cpus,
            num_gpus=size.gpus or None,
        )
        with one_more_cpu() if cpus is not None else nullcontext():
            for answer in answers.iter_rows():
                yield json.loads(answer["row"])


def _task(reader: Callable[..., Callable[[Row], Read | None]], arguments: dict[str, Any]) -> Callable[[Row], Row]:
    """A reader as a function that Ray Data runs in tasks: adds columns "facts" and "array" to a row."""

    def read(row: Row) -> Row:
        facts, array = dict[str, Any](), np.empty(0, np.uint8)
        try:
            found = reader(**arguments)(json.loads(row["row"]))
            if found is not None:
                facts, array = {"read": found.facts}, found.array
        except MilanError as error:
            facts = {"answer": _to_answer(error)}
        return {**row, "facts": json.dumps(facts), "array": array}

    read.__name__ = read.__qualname__ = getattr(reader, "__name__", "read")
    return read


def _on_threads(
    worker: Callable[..., Any], arguments: dict[str, Any], rows: list[Row], threads: int
) -> Generator[Row, None, None]:
    """Runs the rows on threads of this process, each with a worker of its own."""
    local, named = threading.local(), _named(worker)

    def run(row: Row) -> Row:
        if not hasattr(local, "worker"):
            local.worker = named(**arguments)
        return json.loads(local.worker({"row": json.dumps(row)})["row"])

    with freed_memory_kept(), torch_threads(arguments["threads"]), ThreadPoolExecutor(threads) as executor:
        try:
            for _, future in in_flight(
                rows, lambda: AHEAD * threads, lambda row: executor.submit(run, row), first_done
            ):
                yield future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _to_answer(error: MilanError) -> Row:
    """Encodes an error as a worker's answer."""
    return {
        "failure": str(error),
        "gone": isinstance(error, WorkRemovedError),
        "damaged": error.path if isinstance(error, DamagedTable) else None,
    }


def _to_error(answer: Row) -> MilanError:
    """Decodes the error in a worker's answer."""
    if answer["damaged"] is not None:
        return DamagedTable(answer["failure"], answer["damaged"])
    return (WorkRemovedError if answer["gone"] else MilanError)(answer["failure"])


def _named(worker: Callable[..., Any]) -> type:
    """Wraps a worker in a class of the same name, which Ray's dashboard shows, with JSON rows in and out.

    A :class:`MilanError` is returned as an answer: raised inside an actor, it would reach the user wrapped in an error
    of Ray.
    """

    class Named:
        def __init__(self, **arguments: Any) -> None:
            self._failure: Row | None = None
            keep_freed_memory()
            try:
                self._worker = worker(**arguments)
            except MilanError as error:
                self._failure = _to_answer(error)

        def __call__(self, row: Row) -> Row:
            if self._failure is not None:
                return {"row": json.dumps(self._failure)}
            started, shard = time.monotonic(), json.loads(row["row"])
            facts = json.loads(row.get("facts", "{}"))
            read = [Read(facts["read"], row["array"])] if "read" in facts else []
            try:
                answer = facts.get("answer") or self._worker(shard, *read)
            except MilanError as error:
                answer = _to_answer(error)
            seconds = time.monotonic() - started
            return {"row": json.dumps({"seconds": seconds, "name": shard.get("name"), **answer})}

    Named.__name__ = Named.__qualname__ = getattr(worker, "__name__", "Worker")
    return Named
