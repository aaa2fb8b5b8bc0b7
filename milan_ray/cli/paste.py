"""``milan-ray paste``: makes adversarial images by pasting in what units respond to."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import integer, string
from milan_ray.cli.build_configs import cluster, opened
from milan_ray.cli.summary import note, report_on, say_figure, show_plan
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("adversarial images; --probe gives the images that something is pasted on")
    string(group, "--labeler", "NAME", "whose descriptions of the units to read", "milan")
    options.language(group)
    integer(group, "--each", 20, "units of different words, and of the others")
    integer(group, "--originals", 8, "images that are pasted on, per unit")
    integer(group, "--distractors", 8, "exemplars to cut from, per unit, at most")
    integer(group, "--pool", 2000, "images to look for originals among")
    integer(group, "--seed", 0, "seed of the choice of images and of the other units", least=0)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.schema import PASTED
    from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig, summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline, language_name

    storage, models, probe = opened(args)
    config = CutAndPasteConfig(args.labeler, args.each, args.originals, args.distractors, args.pool, seed=args.seed)
    if args.dry_run:
        studies = [CutAndPaste(model, probe, language_name(args.language), config) for model in models]
        return show_plan(args, Plan.of(storage, studies))
    nlp, language = find_spacy_pipeline(args.language)
    with cluster(args) as resources:
        for model in models:
            study = CutAndPaste(model, probe, language, config)
            say(f"{model.name}: {summary(study.run(storage, nlp, resources))}")
            say_figure(storage, PASTED, experiment=study.name, model=model.name)
    note(args, f"adversarial images for {', '.join(model.name for model in models)}", models=[m.name for m in models])
    report_on(args, storage, [model.name for model in models])
    return 0
