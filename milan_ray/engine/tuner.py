"""Trials on Ray Tune; a killed experiment continues where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from milan_ray.config import Resources
from milan_ray.engine.cluster import gpus_each, start

EXPERIMENT = "tune"
"""Folder of Ray Tune's own state, in the work of a stage."""


@dataclass(frozen=True)
class Search:
    """How settings are sampled, and trials stopped early by asynchronous successive halving (ASHA).

    Attributes:
        trials: Number of trials.
        metric: The metric to maximise.
        seed: Seed of the samples.
        optuna: Sample with Optuna, an optional dependency, instead of at random.
        time: The metric that measures a trial's progress, such as epochs.
        max_time: Its largest value.
        grace: Its value before which no trial is stopped.
        reduction: At each halving, one trial in this many continues.
    """

    trials: int
    metric: str
    seed: int
    optuna: bool
    time: str
    max_time: int
    grace: int
    reduction: float

    def config(self, concurrent: int | None) -> ray.tune.TuneConfig:
        """Ray Tune's configuration with at most this many concurrent trials."""
        asha = ASHAScheduler(
            time_attr=self.time, max_t=self.max_time, grace_period=self.grace, reduction_factor=self.reduction
        )
        return ray.tune.TuneConfig(
            metric=self.metric,
            mode="max",
            num_samples=self.trials,
            search_alg=self._algorithm(),
            scheduler=asha,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        )

    def _algorithm(self) -> SearchAlgorithm | Searcher:
        if not self.optuna:
            return BasicVariantGenerator(random_state=self.seed)
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(seed=self.seed)


@dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    Attributes:
        parameters: Its parameters.
        metrics: The metrics that it reported last.
    """

    parameters: dict[str, Any]
    metrics: dict[str, Any]


def run_trials(
    trial: Callable[..., Any],
    task: object,
    work: str,
    space: dict[str, Any],
    resources: Resources,
    search: Search | None = None,
) -> tuple[list[TrialResult], list[Exception]]:
    """Runs the trials of an experiment; continues it where the work holds its state.

    Args:
        trial: Runs one trial: ``trial(parameters, task=task)``. It calls :func:`report`.
        task: The argument that all trials share; stored once.
        work: URI of the folder for the experiment's state.
        space: Parameter → its distribution: :func:`grid`, :func:`choice` or :func:`uniform`.
        resources: CPUs and GPUs of each trial, and how many run at a time.
        search: How to sample; None runs the whole grid.

    Returns:
        The finished trials, in an order that changes after a restart, and the errors of the others.
    """
    if search is None:  # reused actors: a process loads its inputs once for several trials
        config = ray.tune.TuneConfig(reuse_actors=True, max_concurrent_trials=resources.actors)
    else:
        config = search.config(resources.actors)
    start()
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(trial, task=task), {"cpu": resources.cpus_per_actor, "gpu": gpus_each(resources)}
    )
    if ray.tune.Tuner.can_restore(f"{work}/{EXPERIMENT}"):
        tuner = ray.tune.Tuner.restore(f"{work}/{EXPERIMENT}", trainable, restart_errored=True)
    else:
        run = ray.tune.RunConfig(
            name=EXPERIMENT, storage_path=work, verbose=0, failure_config=ray.tune.FailureConfig(max_failures=3)
        )
        tuner = ray.tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run)
    results = tuner.fit()
    finished = [
        TrialResult(result.config, result.metrics)
        for result in (results[number] for number in range(len(results)))
        if result.config is not None and result.metrics is not None
    ]
    return finished, list(results.errors)


def grid(values: Sequence[object]) -> Any:
    """A parameter that takes each value in a trial of its own."""
    return ray.tune.grid_search(list(values))


def choice(values: Sequence[object]) -> Any:
    """A parameter sampled from a list of values."""
    return ray.tune.choice(list(values))


def uniform(low: float, high: float, log: bool) -> Any:
    """A parameter sampled uniformly from a range, on a logarithmic scale if ``log``."""
    return (ray.tune.loguniform if log else ray.tune.uniform)(low, high)


def report(metrics: dict[str, Any]) -> None:
    """Reports metrics; called inside a trial."""
    ray.tune.report(metrics)
