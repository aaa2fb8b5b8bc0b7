"""``milan-ray label``: labels of every unit from the concept maps of its probe."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.closing import close, report_on, show_plan
from milan_ray.cli.records import exemplar_config, model_requests, open_storage, probe_request, resources_of

if TYPE_CHECKING:
    from milan_ray.pipelines.label import LabelConfig


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("labels from concept maps")
    group.add_argument(
        "--labeler",
        type=lambda text: text.split(","),
        default="netdissect,compexp",
        metavar="NAMES",
        help="netdissect (one concept per unit), compexp (a formula of concepts), or both",
    )
    group.add_argument(
        "--legend", metavar="FILE", help="what the numbers in a folder's label maps mean: lines of `number name`"
    )
    group.add_argument(
        "--grid",
        type=options.positive,
        metavar="N",
        help="count on N × N positions (default: about 56, or a small view's own)",
    )
    group.add_argument(
        "--formula-beam-size", type=options.positive, default=5, metavar="N", help="formulas kept per round"
    )
    group.add_argument(
        "--formula-length", type=options.positive, default=3, metavar="N", help="concepts in a formula at most"
    )
    options.add_to(
        parser,
        options.models,
        options.exemplars,
        options.units,
        options.download,
        options.quirks,
        options.storage,
        options.report,
        options.plugins,
        options.resources,
        options.dry_run,
        options.common,
    )


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.pipelines.label import run_labels
    from milan_ray.pipelines.plan import plan_exemplars, plan_labels

    started = time.monotonic()
    how = _label_config(args)
    storage, probe, models = open_storage(args), probe_request(args), model_requests(args)
    resources, config = resources_of(args), exemplar_config(args)
    if args.dry_run:
        plan, layers = plan_exemplars(storage, models, probe, config)
        plan_labels(storage, plan, layers, models, how, args.units)
        return show_plan(plan)
    storage.check_writable()
    with connected(resources):
        done = run_exemplars(storage, models, probe, config, resources)
        failed = done.failed | run_labels(storage, done, models, probe, config, how, resources, args.units)
    labelled = {name: layers for name, layers in done.models.items() if name not in failed}
    report_on(args, storage, list(done.models))
    return close("labels", storage, labelled, failed, started)


def _label_config(args: argparse.Namespace) -> LabelConfig:
    from milan_ray.errors import unknown_name
    from milan_ray.labelers.compexp import CompExp
    from milan_ray.labelers.netdissect import NetDissect
    from milan_ray.pipelines.label import ConceptLabeler, LabelConfig

    composed = CompExp(args.formula_beam_size, args.formula_length)
    known: dict[str, ConceptLabeler] = {NetDissect.name: NetDissect(), CompExp.name: composed}
    for name in args.labeler:
        if name not in known:
            raise unknown_name("labeler", name, known, f"--labeler takes {' or '.join(known)}.")
    chosen = tuple(labeler for name, labeler in known.items() if name in args.labeler)
    return LabelConfig(chosen, args.grid and (args.grid, args.grid))
