"""``milan-ray audit``: finds units that still detect what was blurred out of their network's training images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from milan_ray.cli import describe, options
from milan_ray.cli.arguments import string, table_name, words
from milan_ray.cli.build_configs import writable_storage
from milan_ray.cli.refusals import CLUSTER, DISSECTION, refuse
from milan_ray.cli.search import table, text_model
from milan_ray.cli.summary import note, report_on, say_figure, show_plan
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.planner import Plan
    from milan_ray.storage import Storage
    from milan_ray.studies.auditing.run import Audit
    from milan_ray.studies.auditing.statistics import Pair


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    group = parser.add_argument_group("audit; without --model, of all pairs that the storage has descriptions of")
    string(group, "--suffix", "SUFFIX", "suffix that identifies the blurred twin (--suffix=-masked)", "-blurred")
    group.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("UNBLURRED", "BLURRED"),
        help="a pair of other names; may be repeated, and is then all there is",
    )
    string(
        group,
        "--words",
        "WORDS",
        "searches of descriptions, with commas between (default: face,head,nose,eyes,mouth)",
        type=words,
    )
    string(group, "--labeler", "NAME", "whose descriptions", "milan")
    options.supported(group)
    string(group, "--name", "NAME", "name of the audit in the tables", "faces", type=table_name)
    group.add_argument(
        "--query", action="append", default=[], metavar="TEXT",
        help="then search the units found in blurred networks, e.g. for faces of some people; may be repeated",
    )  # fmt: skip
    group.add_argument("--semantic", nargs="?", const="", metavar="MODEL", help="search by meaning, as in jobs.search")
    options.models(parser, required=False)
    options.probe(parser, required=False)
    options.captioner(parser, required=False)
    options.add_to(
        parser,
        options.exemplars,
        options.clip,
        options.contrast,
        options.search,
        options.units,
        options.download,
        options.quirks,
        options.job,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.plugins import load_plugins
    from milan_ray.schema import AUDITS, DESCRIPTIONS
    from milan_ray.studies.auditing.run import AuditConfig, find_audit, review_path, run_audit
    from milan_ray.studies.auditing.statistics import FACE_WORDS, summary

    load_plugins(args.plugin)
    _refuse(args)
    storage = writable_storage(args)
    config = AuditConfig(
        args.name, tuple(FACE_WORDS if args.words is None else args.words), args.labeler, args.supported_by
    )
    if not config.words:
        raise MilanError("--words holds no word: give some, e.g. --words 'face|person,mouth'.")

    def then(plan: Plan) -> None:
        if not plan.waits(AUDITS.name, (config.name,), DESCRIPTIONS.name):
            plan.stages(storage, [find_audit(storage, _pairs(args, storage), config)])

    status = 0
    if args.decoder is not None or args.milan is not None:
        status = _describe(args, then)
        if args.dry_run:
            return status
    elif args.probe is not None:
        raise MilanError("--probe is for describing: give a --decoder or --milan too.")
    elif args.dry_run:
        plan = Plan()
        then(plan)
        return show_plan(args, plan)
    pairs = _pairs(args, storage)
    audit = run_audit(storage, pairs, config)
    images = audit.pairs["images"][0] or "the same images"
    say(f"exemplars of all networks are from {images}, in which nothing may be blurred")
    say(summary(audit.pairs, audit.rows))
    for query in args.query:
        _follow_up(audit, query, args.semantic)
    review = review_path(storage, config.name)
    say(f"accept or reject each unit in {review}, and run this again")
    say_figure(storage, AUDITS, audit=config.name)
    say(f"table: {storage.uri(AUDITS.name)}")
    report_on(args, storage)
    note(args, f"{len(audit.units)} units of {len(pairs)} pairs found", audit=config.name, review=review)
    return status


def _refuse(args: argparse.Namespace) -> None:
    """Rejects options that would have no effect.

    Raises:
        MilanError: Such an option was given.
    """
    if not args.query:
        refuse(args, ["semantic"], "without --query", "give --query too")
    if args.pair:
        refuse(args, ["suffix"], "with --pair", "leave out --pair")
    if args.decoder is None and args.milan is None:
        if args.pair:
            refuse(args, ["model"], "with --pair", "leave out --pair")
        describing = "layers clip clip_z clip_beam_size clip_lam setting lam beam_size length units encoder_weights"
        contrast = ["contrast", *describe.CONTRAST]
        names = [*DISSECTION, *describing.split(), *contrast, "download", "reference_quirks", *CLUSTER]
        remedy = "give a --decoder or --milan that describes the networks first"
        refuse(args, names, "of networks that are described already,", remedy)


def _pairs(args: argparse.Namespace, storage: Storage) -> list[Pair]:
    """Returns the given pairs, or else all pairs of described networks."""
    from milan_ray.studies.auditing.run import described_models
    from milan_ray.studies.auditing.statistics import pair_models

    pairs = [(model, other) for model, other in args.pair]
    return pairs or pair_models(described_models(storage, args.labeler), args.suffix, args.model)


def _describe(args: argparse.Namespace, then: Callable[[Plan], None]) -> int:
    """Describes the networks first, with the options of ``milan-ray describe``."""
    names = args.model or [name for pair in args.pair for name in pair]
    if not names:
        raise MilanError("to describe networks first, name them with --model, --zoo or --pair.")
    return describe.run(argparse.Namespace(**{**vars(args), "model": names, "no_report": True}), then)


def _follow_up(audit: Audit, query: str, semantic: str | None) -> None:
    from milan_ray.scoring.search import search_descriptions

    blurred = audit.counted.filter(audit.counted["model"].is_in(audit.pairs["other"].implode()))
    units = blurred.select("model", "layer", "unit", "description")
    model = None if semantic is None else text_model(semantic)
    hits = search_descriptions(units, query, model=model, top=20)
    say(f"{len(hits)} units for {query!r} in blurred networks")
    if len(hits):
        say(table(hits))
