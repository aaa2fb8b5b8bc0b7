"""The command line: ``milan-ray VERB …``, and ``python -m jobs.VERB …`` for ``ray job submit``.

One module per verb, with ``add(parser)`` for its options and ``run(args)`` for its work. Torch and Ray are imported by
the verb that needs them, after :func:`milan_ray.runtime.prepare` has settled the environment they read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from milan_ray import runtime
from milan_ray.cli import (
    analyze,
    annotation_sets,
    benchmark,
    compare,
    demo,
    describe,
    diff,
    dnd,
    edit,
    exemplars,
    export,
    label,
    models,
    options,
    report,
    score,
    search,
    status,
    train,
    tune,
)
from milan_ray.errors import MilanError
from milan_ray.progress import LOG, say

VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "models": ("list models, or one model's layers", models.add, models.run),
    "exemplars": ("find every unit's exemplars and masks", exemplars.add, exemplars.run),
    "describe": ("describe every unit of models", describe.add, describe.run),
    "label": ("label every unit by its probe's concept maps, or from a list of concepts", label.add, label.run),
    "train": ("train a captioner on annotated units", train.add, train.run),
    "annotations": ("bring published annotations in, out, and into shape", annotation_sets.add, annotation_sets.run),
    "dnd": ("label every unit by captions and drawn images (Describe-and-Dissect)", dnd.add, dnd.run),
    "export": ("write a captioner as a checkpoint of the reference implementation", export.add, export.run),
    "tune": ("choose λ, beam size and strategy on annotated units", tune.add, tune.run),
    "demo": ("run everything on the built-in world", demo.add, demo.run),
    "score": ("score descriptions on images that did not make them", score.add, score.run),
    "compare": ("compare all labelers on the same units", compare.add, compare.run),
    "search": ("find units by their descriptions", search.add, search.run),
    "diff": ("compare what the units of two networks say", diff.add, diff.run),
    "analyze": ("ablate units in the order of what is said of them", analyze.add, analyze.run),
    "edit": ("remove units that are described by some words", edit.add, edit.run),
    "report": ("write the HTML report of a storage", report.add, report.run),
    "status": ("list what a storage holds, stale, orphaned and unfinished", status.add, status.run),
    "benchmark": ("measure a stage beside its bare computation", benchmark.add, benchmark.run),
}
"""Verb → its summary, its options, its work."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: The command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0 when all is done, 1 when something could not be.
    """
    parser = argparse.ArgumentParser(
        prog="milan-ray", description="Natural-language descriptions of every unit of vision models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (summary, add, run) in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary.capitalize() + ".", formatter_class=options.Help
        )
        add(verb)
        verb.set_defaults(run=run)
    args = parser.parse_args(arguments)
    runtime.prepare(getattr(args, "address", None))
    if args.log is not None:
        os.environ[LOG] = args.log
    try:
        return args.run(args)
    except MilanError as error:
        if args.debug:
            raise
        say(f"error: {error}", level="error")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on from here.", level="error")
        return 130
