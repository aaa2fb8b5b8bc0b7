"""``milan-ray edit``: removes the units whose descriptions contain given words, and measures the effect."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.build_configs import absolute, opened, probe_ref, resources_of
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note, report_on, show_plan
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.references import ProbeRef


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("editing; --probe gives the validation images, which are like those of training")
    group.add_argument(
        "--test", nargs="+", metavar="SOURCE", help="images that judge: those that the network should not fail on"
    )
    group.add_argument("--labeler", default="milan", help="whose descriptions of the units to read")
    group.add_argument(
        "--words",
        nargs="+",
        metavar="WORD",
        help="what unwanted units' descriptions contain (default: text word letter)",
    )
    group.add_argument("--most", type=options.positive, default=50, metavar="N", help="units removed at most")
    group.add_argument("--trials", type=options.positive, default=5, help="random orders beside the others")
    group.add_argument("--seed", type=options.count, default=0, help="of the random orders")
    group.add_argument(
        "--remove", type=options.positive, metavar="N", help="units to remove (default: by validation accuracy)"
    )
    group.add_argument(
        "--fine-tune", nargs="+", metavar="SOURCE", help="then fine-tune the last layer on these images, with classes"
    )
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate of the fine-tuning")
    group.add_argument(
        "--out", metavar="FILE", help="write the network's weights without these units, .pth or .safetensors"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.cluster import connected
    from milan_ray.models.heads import HeadTraining
    from milan_ray.models.weights import save_weights
    from milan_ray.report.figures import figure_path
    from milan_ray.schema import ABLATIONS
    from milan_ray.studies.editing.run import (
        Editing,
        EditingConfig,
        edited_weights,
        run_fine_tuning,
        summary,
    )
    from milan_ray.studies.editing.statistics import TEXT

    if args.fine_tune is None:
        refuse(args, ["lr"], "without --fine-tune", "give --fine-tune too")
    storage, models, validation = opened(args)
    if len(models) > 1:
        raise MilanError("a network is edited at a time: give a single --model.")
    test = None if args.test is None else _probe(args, args.test)
    train = None if args.fine_tune is None else _probe(args, args.fine_tune)
    config = EditingConfig(args.labeler, tuple(args.words or TEXT), args.most, args.trials, args.seed)
    study = Editing(models[0], validation, test, config)
    if args.dry_run:
        return show_plan(args, study.plan(storage, tuned=train is not None))
    with connected(resources_of(args)):
        edit = study.run(storage, resources_of(args))
        say(summary(edit))
        count = args.remove or edit.stop
        tuned = None
        if train is not None:
            training = HeadTraining(lr=args.lr, seed=args.seed)
            rows, tuned = run_fine_tuning(storage, study, edit, count, train, training, resources_of(args))
            for split, ablated, accuracy in rows.select("split", "ablated", "accuracy").iter_rows():
                say(f"  {split}: {accuracy:.3f} without {ablated} units and with the last layer fine-tuned")
    figure = figure_path(storage, ABLATIONS, experiment=study.name, model=models[0].name)
    say(f"figure: {storage.uri(figure)}")
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
