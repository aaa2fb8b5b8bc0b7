"""The paper's experiments on the built-in world, one module each, and all of them together (``jobs.paper``)."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone

import polars as pl

from milan_ray.config import Resources, config_hash
from milan_ray.engine.planner import Plan, Step
from milan_ray.errors import MilanError, unknown_name
from milan_ray.progress import say
from milan_ray.schema import CLAIMS
from milan_ray.showcase import demo
from milan_ray.showcase.paper import analysis, annotators, auditing, baselines, cut_and_paste, editing, generalization
from milan_ray.showcase.paper.claims import Claim, Section
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.showcase.paper.page import store_section
from milan_ray.storage import Storage
from milan_ray.studies.tables import write_frame

EXPERIMENTS: Mapping[str, Callable[[ExperimentContext], Section]] = {
    "generalization": generalization.run,
    "baselines": baselines.run,
    "analysis": analysis.run,
    "audit": auditing.run,
    "editing": editing.run,
    "cut-and-paste": cut_and_paste.run,
    "annotations": annotators.run,
}
"""Name → function that runs the experiment, in the paper's order."""


def chosen(names: Sequence[str]) -> list[str]:
    """The experiments of some names, in the paper's order; all if there are no names.

    Raises:
        MilanError: There is no experiment of a name.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    return [name for name in EXPERIMENTS if not names or name in names]


def prepare(context: ExperimentContext, threads: int) -> None:
    """Makes what the experiments need, unless it is up to date: the demo, its generator, and the sets of its groups.

    The captioners of the groups are left out, because experiments train those that they compare. Small sizes need only
    the demo.

    Args:
        context: Run directory, resources and size.
        threads: Torch threads of the training worker.
    """
    _prepare(demo.Steps(context.storage, demo.EXEMPLARS, context.resources), context.small, threads)


def plan_paper(storage: Storage, small: bool, names: Sequence[str]) -> Plan:
    """The dry run of :func:`prepare`, and of the experiments.

    Every run of an experiment computes its claims again. Which of its own tables it makes is not known before the run.

    Args:
        storage: The run directory.
        small: With sizes of a test.
        names: The experiments.
    """
    plan = Plan()
    _prepare(demo.Steps(storage, demo.EXEMPLARS, Resources(), plan), small)
    for name in names:
        known = storage.metadata(CLAIMS, experiment=name) is not None
        reason = "found anew by every run, from tables of its own that it makes where they are missing or stale"
        plan.steps.append(Step(CLAIMS.name, (name,), reason if known else "missing"))
    return plan


def _prepare(steps: demo.Steps, small: bool, threads: int = 1) -> None:
    steps.main(threads)
    if not small:
        steps.generator()
        steps.sets()


def run_experiments(context: ExperimentContext, names: Sequence[str]) -> list[Section]:
    """Runs experiments one after the other and stores the results of each; a failure does not stop the others.

    Args:
        context: Run directory, resources and size.
        names: Names of the experiments.

    Returns:
        A section of the page for each; that of a failed experiment has the error.
    """
    sections = []
    for place, name in enumerate(names):
        say(f"\n[{place + 1}/{len(names)}] {name}")
        started = time.monotonic()
        try:
            section = EXPERIMENTS[name](context)
            seconds, now = time.monotonic() - started, datetime.now(timezone.utc).isoformat(timespec="seconds")
            section = replace(section, name=name, small=context.small, seconds=seconds, finished=now)
            _store_claims(context.storage, section)
            store_section(context.storage, section)
        except Exception as error:
            if not isinstance(error, MilanError):
                say(traceback.format_exc(), level="error")
            reason = str(error) if isinstance(error, MilanError) else f"{type(error).__name__}: {error}"
            say(f"{name} failed: {reason}", level="error")
            sections.append(Section(name, name, small=context.small, seconds=time.monotonic() - started, error=reason))
            continue
        sections.append(section)
        say(f"{name}: {section.seconds:.0f} s")
        for claim in section.claims:
            say(f"  {verdict(claim.reproduced)}: {claim.text} {claim.ours}")
    return sections


def verdict(reproduced: bool | None) -> str:
    """A verdict in words."""
    return {True: "reproduced", False: "NOT reproduced", None: "cannot be said"}[reproduced]


def _store_claims(storage: Storage, section: Section) -> None:
    columns = {field.name: pl.String for field in fields(Claim)} | {"reproduced": pl.Boolean}
    claims = pl.DataFrame([vars(claim) for claim in section.claims], columns).rename({"text": "claim"})
    about = claims.with_columns(small=pl.lit(section.small), seconds=pl.lit(section.seconds))
    config = config_hash({"claims": 1, "of": section.claims})
    write_frame(storage, CLAIMS, about, config, experiment=section.name)
