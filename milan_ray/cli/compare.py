"""``milan-ray compare``: compares all labelers on the same units."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import string, strings, table_name
from milan_ray.cli.build_configs import bert_score_folder, cluster, writable_storage
from milan_ray.cli.refusals import CLUSTER, refuse
from milan_ray.cli.summary import note, report_on, show_plan
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    strings(parser, "--model", "NAME", "only these models, or patterns ('resnet*')")
    strings(parser, "--labeler", "NAME", "only these labelers, or patterns; the first is the main one")
    string(parser, "--annotations", "SOURCE", "whose annotations (default: the one source there is)")
    options.bertscore(parser)
    string(parser, "--name", "NAME", "what its tables begin with", "comparison", type=table_name)
    options.job(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.plugins import load_plugins
    from milan_ray.studies.comparison.run import find_comparison, summary

    load_plugins(args.plugin)
    refuse(
        args,
        [name for name in CLUSTER if name != "address"],
        "in a comparison, which runs next to nothing,",
        "give --address alone",
    )
    storage = writable_storage(args)
    comparison = find_comparison(
        storage,
        models=args.model,
        labelers=args.labeler,
        source=args.annotations,
        bert_score=bert_score_folder(args),
        name=args.name,
    )
    if args.dry_run:
        return show_plan(args, Plan.of(storage, [comparison]))
    with cluster(args):
        scores = comparison.run(storage)
    say(summary(scores))
    report_on(args, storage)
    say(f"tables: {storage.uri('scores')}; figures are in the same folders")
    note(args, "compared", experiments=sorted(set(scores["experiment"].to_pylist())))
    return 0
