"""``milan-ray compare``: all labelers on the same units."""

from __future__ import annotations

import argparse
import time

from milan_ray.cli import options
from milan_ray.cli.closing import report_on
from milan_ray.cli.records import absolute, open_storage, resources_of
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these models, or patterns ('resnet*')")
    parser.add_argument(
        "--labeler", nargs="+", metavar="NAME", help="only these labelers, or patterns; the first is the main one"
    )
    parser.add_argument("--annotations", metavar="SOURCE", help="whose annotations (default: the one source there is)")
    parser.add_argument(
        "--bertscore", metavar="FOLDER", help="language model for BERTScore (default: that of milan-ray[minilm])"
    )
    parser.add_argument("--name", default="comparison", help="what its tables begin with")
    options.add_to(parser, options.storage, options.report, options.plugins, options.resources, options.common)


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.compare import run_comparison, summary
    from milan_ray.plugins import load_plugins
    from milan_ray.scoring.text import minilm_directory

    started = time.monotonic()
    load_plugins(args.plugin)
    storage, resources = open_storage(args), resources_of(args)
    storage.check_writable()
    bert = absolute("--bertscore", args.bertscore) if args.bertscore else minilm_directory()
    with connected(resources):
        scores = run_comparison(
            storage,
            models=args.model,
            labelers=args.labeler,
            source=args.annotations,
            bert_score=bert,
            name=args.name,
        )
    say(summary(scores))
    report_on(args, storage)
    say(f"tables: {storage.uri('scores')}, with figures beside them; done in {time.monotonic() - started:.0f} s")
    return 0
