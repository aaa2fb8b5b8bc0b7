"""Demand for one more CPU, which an autoscaler sees for as long as no CPU is free."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

EVERY = 10.0
"""Seconds after a CPU was free until the next one is asked for."""

_STOP = 0.5
"""Seconds in which the end of the demand is noticed."""


@contextmanager
def one_more_cpu() -> Iterator[None]:
    """While the body runs, a task that needs a CPU, and does nothing, waits whenever all CPUs of the cluster are taken.

    Nodes with CPUs alone come for it, one at a time, up to as many as the cluster may have. Ray Data does not see to
    that: it submits no task for which there is no CPU, and since Ray 2.60 it asks for all that it could use at once, of
    which Ray's autoscaler gives nothing where it is more than the cluster may have.
    """
    nothing = ray.remote(num_cpus=1, max_retries=-1)(_nothing)
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            task = nothing.remote()
            while not over.is_set() and not ray.wait([task], timeout=_STOP)[0]:
                pass
            if over.wait(EVERY):
                ray.cancel(task)

    thread = threading.Thread(target=ask, name="one more CPU", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _nothing() -> None:
    """Needs a CPU and nothing else."""
