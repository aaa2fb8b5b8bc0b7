"""What is settled for a whole process: environment variables that torch and Ray read only once, and its allocator."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``."""

KEPT = 2**30
"""Freed bytes at the end of the heap above which a process gives them back."""


def prepare(address: str | None) -> str | None:
    """Sets the environment of this process and of the workers that it will start.

    Args:
        address: A Ray cluster's address as the user gave it, or None.

    Returns:
        The address to join: the given one, else ``RAY_ADDRESS``; None for a local cluster.
    """
    # Two OpenMP threads with active waiting stall each other as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray Train's controller polls for an epoch's report; by default every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Ray Tune's newer output prints tables at any verbosity; this package prints its own progress.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        os.environ.pop("RAY_ADDRESS", None)  # Ray does not accept an empty address
        # Binds every socket of a local Ray to loopback, on Linux too; a cluster of several nodes is then impossible.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Explicit, because Ray warns when it falls back to the same default.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        return None
    return address


def in_submitted_job() -> bool:
    """Whether this process is the driver of a ``ray job submit``, whose working directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def keep_freed_memory() -> bool:
    """Lets this process reuse the memory that it frees, instead of giving it back and asking for it again.

    By default, glibc takes large blocks from the system one by one. A network's outputs are such blocks, so the system
    clears every page of every output again and again: a fifth of the time of a ResNet on a CPU. What is computed stays
    the same to the last bit.

    Returns:
        Whether it does now. It does not where there is no glibc, or where the user has set its allocator.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM, KEPT))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """:func:`keep_freed_memory` for a while, for processes that do other things afterwards, which then get it back."""
    kept = keep_freed_memory()
    try:
        yield
    finally:
        mallopt = _mallopt()
        if kept and mallopt is not None:
            mallopt(_MMAP_MAX, 65536)
            # What glibc raises these to by itself in a process that frees large blocks.
            mallopt(_MMAP_THRESHOLD, 2**25)
            mallopt(_TRIM, 2**26)
            ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """Glibc's function, if it is this process's allocator and the user has not set it."""
    settled = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or settled:
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
