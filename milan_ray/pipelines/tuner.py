"""A Ray Tune experiment that goes on where a killed job left off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.tune

from milan_ray.config import Resources
from milan_ray.pipelines.cluster import gpus_each, start

EXPERIMENT = "tune"
"""Folder of Ray Tune's own state, in the work of a tuning."""


def resumable_tuner(
    trial: Callable[..., Any],
    task: object,
    work: str,
    param_space: dict[str, Any],
    config: ray.tune.TuneConfig,
    resources: Resources,
) -> ray.tune.Tuner:
    """The tuner of an experiment, as it stood when the work holds one already.

    Args:
        trial: Runs one trial: ``trial(parameters, task=task)``.
        task: What all trials share; it is stored once.
        work: URI of the folder for the experiment's state.
        param_space: What trials draw from.
        config: Number of trials, searcher, scheduler.
        resources: What each trial gets.
    """
    start()
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(trial, task=task), {"cpu": resources.cpus_per_actor, "gpu": gpus_each(resources)}
    )
    if ray.tune.Tuner.can_restore(f"{work}/{EXPERIMENT}"):
        return ray.tune.Tuner.restore(f"{work}/{EXPERIMENT}", trainable, restart_errored=True)
    run = ray.tune.RunConfig(
        name=EXPERIMENT, storage_path=work, verbose=0, failure_config=ray.tune.FailureConfig(max_failures=3)
    )
    return ray.tune.Tuner(trainable, param_space=param_space, tune_config=config, run_config=run)
