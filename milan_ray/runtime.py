"""Environment variables that must be set before torch and Ray are imported, which read them only once."""

from __future__ import annotations

import os


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
