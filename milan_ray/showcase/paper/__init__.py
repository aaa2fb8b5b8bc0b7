"""The paper's experiments on the built-in world, one module each, and all of them together (``jobs.paper``)."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from milan_ray.config import Resources, config_hash
from milan_ray.engine.planner import Plan, Step
from milan_ray.errors import MilanError, unknown_name
from milan_ray.progress import say
from milan_ray.schema import CLAIMS
from milan_ray.showcase import demo
from milan_ray.showcase.paper import analysis, annotators, auditing, baselines, cut_and_paste, editing, generalization
from milan_ray.showcase.paper.claims import Section
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.showcase.paper.page import Entry, entry_of, store_entry
from milan_ray.storage import Storage

EXPERIMENTS: Mapping[str, Callable[[ExperimentContext], Section]] = {
    "generalization": generalization.run,
    "baselines": baselines.run,
    "analysis": analysis.run,
    "audit": auditing.run,
    "editing": editing.run,
    "cut-and-paste": cut_and_paste.run,
    "annotations": annotators.run,
}
"""Name → what runs it, in the paper's order."""


def chosen(names: Sequence[str]) -> list[str]:
    """The experiments of some names, in the paper's order; all for none.

    Raises:
        MilanError: There is none of a name.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise unknown_name("experiment", name, EXPERIMENTS)
    return [name for name in EXPERIMENTS if not names or name in names]


def prepare(context: ExperimentContext, threads: int) -> None:
    """Makes what the experiments stand on, where it is not there: the demo, its generator, and the sets of its groups.

    The captioners of the groups are left out: experiments train those that they compare. With small sizes it is the
    demo alone.

    Args:
        context: Where.
        threads: Torch threads of the training worker.
    """
    _prepare(demo.Steps(context.storage, demo.EXEMPLARS, context.resources), context.small, threads)


def plan_paper(storage: Storage, small: bool, names: Sequence[str]) -> Plan:
    """The dry run of :func:`prepare`, and of the experiments as far as it can be told.

    Every run of an experiment finds its claims anew; which of its own tables it makes for that only the run itself
    says.

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


def run_experiments(context: ExperimentContext, names: Sequence[str]) -> list[Entry]:
    """Runs experiments one after the other; what one finds is kept at once, and one that fails stops no other.

    Args:
        context: Where and how large.
        names: Which.

    Returns:
        An entry of the page for each; one that failed says why.
    """
    entries = []
    for place, name in enumerate(names):
        say(f"\n[{place + 1}/{len(names)}] {name}")
        started = time.monotonic()
        try:
            section = EXPERIMENTS[name](context)
            entry = entry_of(section, name, context.small, time.monotonic() - started)
            _store_claims(context.storage, entry)
            store_entry(context.storage, entry)
        except Exception as error:
            if not isinstance(error, MilanError):
                say(traceback.format_exc(), level="error")
            reason = str(error) if isinstance(error, MilanError) else f"{type(error).__name__}: {error}"
            say(f"{name} failed: {reason}", level="error")
            entries.append(Entry(name, name, small=context.small, seconds=time.monotonic() - started, error=reason))
            continue
        entries.append(entry)
        say(f"{name}: {entry.seconds:.0f} s")
        for claim in entry.claims:
            say(f"  {verdict(claim.reproduced)}: {claim.text} {claim.ours}")
    return entries


def verdict(reproduced: bool | None) -> str:
    """A verdict in words."""
    return {True: "reproduced", False: "NOT reproduced", None: "cannot be said"}[reproduced]


def _store_claims(storage: Storage, entry: Entry) -> None:
    claims = entry.claims
    table = CLAIMS.table(
        {
            "experiment": [entry.name] * len(claims),
            "claim": [claim.text for claim in claims],
            **{
                column: [getattr(claim, column) for claim in claims]
                for column in ("paper", "ours", "reproduced", "note")
            },
            "small": [entry.small] * len(claims),
            "seconds": [entry.seconds] * len(claims),
        }
    )
    storage.write(CLAIMS, table, config_hash({"claims": 1, "of": claims}), experiment=entry.name)
