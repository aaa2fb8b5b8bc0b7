"""Trials on Ray Tune, which go on where a killed job left off."""

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
"""Folder of Ray Tune's own state, in the work of a tuning."""


@dataclass(frozen=True)
class Halving:
    """Which trials are stopped early, by asynchronous successive halving (ASHA).

    Attributes:
        time: Metric that counts how far a trial is.
        most: Its largest value.
        grace: Its value before which no trial is stopped.
        reduction: One trial in so many goes on.
    """

    time: str
    most: int
    grace: int
    reduction: float


@dataclass(frozen=True)
class Search:
    """How trials are drawn from a space.

    Attributes:
        trials: How many.
        metric: What is to be large.
        seed: Seed of the draws.
        optuna: Draw by Optuna, an extra, in place of at random.
        halving: Which are stopped early.
    """

    trials: int
    metric: str
    seed: int
    optuna: bool
    halving: Halving

    def config(self, together: int | None) -> ray.tune.TuneConfig:
        """The same for Ray Tune, with so many trials at a time."""
        asha = ASHAScheduler(
            time_attr=self.halving.time,
            max_t=self.halving.most,
            grace_period=self.halving.grace,
            reduction_factor=self.halving.reduction,
        )
        return ray.tune.TuneConfig(
            metric=self.metric,
            mode="max",
            num_samples=self.trials,
            search_alg=self._algorithm(),
            scheduler=asha,
            max_concurrent_trials=together,
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
class Tried:
    """One trial.

    Attributes:
        parameters: What it was run with.
        metrics: What it reported last.
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
) -> tuple[list[Tried], list[Exception]]:
    """Runs the trials of an experiment, from where they stood when the work holds one already.

    Args:
        trial: Runs one trial: ``trial(parameters, task=task)``. It calls :func:`report`.
        task: What all trials share; it is stored once.
        work: URI of the folder for the experiment's state.
        space: What trials draw from: :func:`every_one`, :func:`one_of`, :func:`between`.
        resources: What each trial gets, and how many run at a time.
        search: How to draw; None runs every one.

    Returns:
        The trials, in no order that a restart keeps, and what went wrong.
    """
    # A process that has loaded what a trial needs runs one trial after the other.
    every = ray.tune.TuneConfig(reuse_actors=True, max_concurrent_trials=resources.actors)
    results = _tuner(
        trial, task, work, space, every if search is None else search.config(resources.actors), resources
    ).fit()
    found = []
    for number in range(len(results)):
        parameters, metrics = results[number].config, results[number].metrics
        if parameters is not None and metrics is not None:
            found.append(Tried(parameters, metrics))
    return found, list(results.errors)


def _tuner(
    trial: Callable[..., Any],
    task: object,
    work: str,
    space: dict[str, Any],
    config: ray.tune.TuneConfig,
    resources: Resources,
) -> ray.tune.Tuner:
    start()
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(trial, task=task), {"cpu": resources.cpus_per_actor, "gpu": gpus_each(resources)}
    )
    if ray.tune.Tuner.can_restore(f"{work}/{EXPERIMENT}"):
        return ray.tune.Tuner.restore(f"{work}/{EXPERIMENT}", trainable, restart_errored=True)
    run = ray.tune.RunConfig(
        name=EXPERIMENT, storage_path=work, verbose=0, failure_config=ray.tune.FailureConfig(max_failures=3)
    )
    return ray.tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run)


def every_one(values: Sequence[object]) -> Any:
    """A parameter that takes each of some values, in a trial of its own."""
    return ray.tune.grid_search(list(values))


def one_of(values: Sequence[object]) -> Any:
    """A parameter that is drawn from some values."""
    return ray.tune.choice(list(values))


def between(low: float, high: float, log: bool) -> Any:
    """A parameter that is drawn from a range, evenly or so that its logarithm is."""
    return (ray.tune.loguniform if log else ray.tune.uniform)(low, high)


def report(metrics: dict[str, Any]) -> None:
    """Inside a trial: how far it is."""
    ray.tune.report(metrics)
