"""``milan-ray edit``: removes the units whose descriptions contain given words, and measures the effect."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import integer, number, string, strings
from milan_ray.cli.build_configs import absolute, cluster, opened, probe_ref
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note, report_on, say_figure, show_plan
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.references import ProbeRef


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("editing; --probe gives the validation images, which are like those of training")
    strings(group, "--test", "SOURCE", "images that judge: those that the network should not fail on")
    string(group, "--labeler", "NAME", "whose descriptions of the units to read", "milan")
    options.supported(group)
    strings(group, "--words", "WORD", "what unwanted units' descriptions contain (default: text word letter)")
    integer(group, "--most", 50, "units removed at most")
    integer(group, "--trials", 5, "random orders, in addition to the others")
    integer(group, "--seed", 0, "seed of the random orders", least=0)
    integer(group, "--remove", None, "units to remove (default: by validation accuracy)")
    strings(group, "--fine-tune", "SOURCE", "then fine-tune the last layer on these images, with classes")
    number(group, "--lr", 1e-4, "learning rate of the fine-tuning")
    string(group, "--out", "FILE", "write the network's weights without these units, .pth or .safetensors")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.models.heads import HeadTraining
    from milan_ray.models.weights import save_weights
    from milan_ray.schema import ABLATIONS
    from milan_ray.studies.editing.run import Editing, EditingConfig, edited_weights, run_fine_tuning, summary
    from milan_ray.studies.editing.statistics import TEXT

    if args.fine_tune is None:
        refuse(args, ["lr"], "without --fine-tune", "give --fine-tune too")
    storage, models, validation = opened(args)
    if len(models) > 1:
        raise MilanError("a network is edited at a time: give a single --model.")
    test = None if args.test is None else _probe(args, args.test)
    train = None if args.fine_tune is None else _probe(args, args.fine_tune)
    config = EditingConfig(
        args.labeler, tuple(args.words or TEXT), args.most, args.trials, args.seed, args.supported_by
    )
    study = Editing(models[0], validation, test, config)
    if args.dry_run:
        return show_plan(args, study.plan(storage, tuned=train is not None))
    with cluster(args) as resources:
        edit = study.run(storage, resources)
        say(summary(edit))
        count = args.remove or edit.stop
        tuned = None
        if train is not None:
            training = HeadTraining(lr=args.lr, seed=args.seed)
            rows, tuned = run_fine_tuning(storage, study, edit, count, train, training, resources)
            for split, ablated, accuracy in rows.select("split", "ablated", "accuracy").iter_rows():
                say(f"  {split}: {accuracy:.3f} without {ablated} units and with the last layer fine-tuned")
    say_figure(storage, ABLATIONS, experiment=study.name, model=models[0].name)
    if args.out is not None:
        path = Path(absolute("--out", args.out))
        weights = edited_weights(models[0], edit.removed(count), validation)
        save_weights(weights | (tuned.state if tuned else {}), path)
        say(f"edited weights: {path}")
        note(args, weights=str(path))
    note(args, f"{models[0].name} edited", units=count)
    report_on(args, storage, [models[0].name])
    return 0


def _probe(args: argparse.Namespace, sources: list[str]) -> ProbeRef:
    """Returns the probe of another option's images, read like those of ``--probe``."""
    return probe_ref(argparse.Namespace(**{**vars(args), "probe": sources}))
