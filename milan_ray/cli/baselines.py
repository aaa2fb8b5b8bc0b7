"""``milan-ray baselines``: compares MILAN with labels from concept maps, on networks held out from its training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import string, table_name
from milan_ray.cli.build_configs import bert_score_folder, cluster, encoder_ref, exemplar_config, find_captioner, opened
from milan_ray.cli.summary import report_on, say_figure, show_plan
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.references import ModelRef
    from milan_ray.storage import Storage
    from milan_ray.studies.baselines.run import HeldOut


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("labels from concept maps")
    string(group, "--legend", "FILE", "names of the numbers in a folder's label maps: lines of `number name`")
    group = parser.add_argument_group("comparison")
    string(group, "--annotations", "SOURCE", "whose annotations (default: the one source there is)")
    options.bertscore(group)
    string(group, "--name", "NAME", "what its tables begin with", "baselines", type=table_name)
    options.captioner(parser, required=False)
    options.add_to(parser, options.search, options.dissection)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.schema import SCORES
    from milan_ray.stages.concept_labels import LabelConfig
    from milan_ray.studies.baselines.run import BaselinesJob, plan_baselines, run_baselines
    from milan_ray.studies.baselines.statistics import summary

    storage, models, probe = opened(args)
    job = BaselinesJob(
        [_held_out(args, storage, model) for model in models],
        probe,
        exemplar_config(args),
        LabelConfig(),
        args.annotations,
        bert_score_folder(args),
        args.name,
    )
    if args.dry_run:
        return show_plan(args, plan_baselines(storage, job))
    with cluster(args) as resources:
        rows = run_baselines(storage, job, resources)
    say(f"agreement with annotations, and where the built-in world judges, with what it knows:\n{summary(rows)}")
    say_figure(storage, SCORES, experiment=args.name)
    report_on(args, storage, [model.name for model in models])
    return 0


def _held_out(args: argparse.Namespace, storage: Storage, model: ModelRef) -> HeldOut:
    """Pairs a network with its captioner: the given one, or else one of all sets but its own, trained or published."""
    from milan_ray.cli.describe import search_of
    from milan_ray.stages.captioners import find_milan, has_captioner, load_captioner
    from milan_ray.studies.baselines.run import HeldOut

    if args.milan is not None or args.decoder is not None:
        decoder = find_captioner(args, storage)
    else:
        own = f"not-{model.name.replace('/', '-')}"
        decoder = own if has_captioner(storage, own) else find_milan(own)
    encoder = encoder_ref(args, load_captioner(storage, decoder).encoder_name, storage, decoder)
    return HeldOut(model, search_of(args, decoder), encoder)
