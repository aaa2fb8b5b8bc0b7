"""``milan-ray score``: measures how well descriptions fit their units, alongside trivial baselines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import choice, flag, fraction, integer, names, string, strings
from milan_ray.cli.build_configs import cluster, feature_layers, image_text_ref, opened
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import close, note, show_plan
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    import pyarrow as pa

    from milan_ray.engine.references import ModelRef
    from milan_ray.engine.stage import RunnableStage
    from milan_ray.scoring.simulation import Sigmoid
    from milan_ray.stages.scores import Described
    from milan_ray.stages.scores.inputs import Classes
    from milan_ray.storage import Storage


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("scores")
    string(group, "--labeler", "NAMES", "only theirs (default: all)", [], type=names)
    string(
        group,
        "--clip",
        "MODEL",
        "CLIP or SigLIP that judges: a folder, the name of one in $MILAN_MODELS_DIR, or a registered one "
        "(world/truth: the built-in world's concept maps)",
    )
    string(
        group, "--generator", "NAME", "registered generator of images from descriptions (CoSy), such as world/painter"
    )
    integer(group, "--images", 50, "generated images per text")
    string(group, "--prompt", "TEXT", "prompt of the generator; {} is the description", "{}")
    choice(group, "--pooling", ("mean", "max"), "value of a unit's map of an image", "mean")
    fraction(group, "--held-out", 1.0, "share of the probe's images to score on")
    fraction(group, "--top", 0.01, "AUPRC: share of images that count as exciting")
    integer(group, "--retrieved", 50, "retrieval: images nearest to a description")
    string(
        group, "--sigmoid", "A,B", "simulation: 1 / (1 + exp(−A·(cos + B))) (default: by CLIP or SigLIP)", type=_sigmoid
    )
    flag(group, "--class-names", "also compare descriptions with class names, in layers with one unit per class")
    flag(group, "--sanity", "also judge the scores themselves, where the model's classes are concepts of --clip's maps")
    strings(
        group,
        "--calibrate",
        "UNTRAINED",
        "learn the probabilities of verdicts: true are the concepts of --model's units, as with --sanity; false are "
        "these shuffled, and what is said of these described networks with random weights",
    )
    integer(group, "--seed", 0, "seed of the shuffled row and the bootstrap", least=0)
    options.add_to(parser, options.models, options.download, options.stages)


def _sigmoid(text: str) -> Sigmoid:
    from milan_ray.scoring.simulation import Sigmoid

    a, b = (float(part) for part in text.split(","))
    return Sigmoid(a, b)


def _learning(args: argparse.Namespace, storage: Storage, classes: Classes) -> tuple[Classes, tuple[Described, ...]]:
    """What ``--calibrate`` learns from: layers of other networks whose concepts are known, and what is untrained.

    Raises:
        MilanError: One of the untrained networks is not described, or no other network has such a layer.
    """
    from milan_ray.stages.scores import described_layers

    untrained: list[str] = args.calibrate or []
    found = tuple(layer for name in untrained for layer in described_layers(storage, [name], args.labeler))
    truth = {keys: names for keys, names in classes.items() if untrained and keys[0] not in untrained}
    if untrained and not truth:
        raise MilanError(
            f"--calibrate {' '.join(untrained)} learns true descriptions from other networks: name one with --model "
            "whose units stand for known concepts."
        )
    return truth, found


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.tasks import models_apart
    from milan_ray.models.generators import GeneratorRef
    from milan_ray.schema import SCORES
    from milan_ray.scoring.score_sanity import failing
    from milan_ray.stages.cosy import CosyConfig, CosyScores
    from milan_ray.stages.scores import Learning, ScoreConfig, class_layers, described_layers, run_scores, score_stages

    if args.clip is None and args.generator is None:
        raise MilanError("give what judges: a model of images and texts with --clip, or --generator, or both.")
    if args.clip is None:
        judged = ["top", "retrieved", "sigmoid", "class_names", "sanity", "calibrate"]
        refuse(args, judged, "without --clip", "give --clip too")
    if args.generator is None:
        refuse(args, ["images", "prompt", "weights", "activations"], "without --generator", "give --generator too")
    storage, models, probe = opened(args, runs=args.generator is not None)
    described = described_layers(storage, [model.name for model in models], args.labeler, feature_layers(args)[0])
    config = ScoreConfig(args.pooling, args.held_out, args.top, args.retrieved, args.sigmoid, args.seed)
    judge = None if args.clip is None else image_text_ref(args)
    named = args.clip and (args.class_names or args.sanity or args.calibrate)
    classes = class_layers(storage, described, _classes(models)) if named else {}
    truth, untrained = _learning(args, storage, classes)
    painter, cosy = GeneratorRef(args.generator or ""), CosyConfig(args.images, args.seed, args.prompt)
    layers = {
        model: list(dict.fromkeys(what.layer for what in described if what.model == model))
        for model in dict.fromkeys(what.model for what in described)
    }

    def judgements(left: Mapping[str, Sequence[str]]) -> Iterator[list[RunnableStage]]:
        """Yields the stages of each judge, for some models."""
        chosen = [what for what in described if what.model in left]
        if judge is not None:
            own = {keys: names for keys, names in classes.items() if keys[0] in left}
            compared, judged = own if args.class_names else None, own if args.sanity else None
            known = {keys: names for keys, names in truth.items() if keys[0] in left}
            learning = Learning(known, untrained) if known else None
            yield score_stages(chosen, probe, judge, config, compared, judged, learning)
        if args.generator is not None:
            generating = [model for model in models if model.name in left]
            yield [CosyScores(chosen, probe, generating, painter, cosy, config)]

    if args.dry_run:
        plan = Plan()
        for stages in judgements(layers):
            plan.stages(storage, stages)
        return show_plan(args, plan)
    experiments: list[str] = []

    def score(left: dict[str, Sequence[str]]) -> None:
        experiments.clear()
        for stages in judgements(left):
            experiments.extend(run_scores(storage, stages, config, resources))

    failed: dict[str, str] = {}
    with cluster(args) as resources:
        done = models_apart(score, layers, failed)
    tables = [storage.read(SCORES, experiment=experiment) for experiment in experiments]
    failed_tests = failing(row for table in tables for row in table.to_pylist())
    for table in tables:
        say(_text(table, failed_tests))
    note(args, experiments=experiments)
    return close(args, "scores", done, failed)


def _classes(models: list[ModelRef]) -> dict[str, tuple[str, ...]]:
    """Collects the class names of models: model → names.

    Raises:
        MilanError: A model's classes have no names.
    """
    from milan_ray.engine import references

    classes: dict[str, tuple[str, ...]] = {}
    for model in models:
        names = references.model(model).classes
        if names is None:
            raise MilanError(f"{model.name} is registered without names of its classes; leave out --class-names.")
        classes[model.name] = names
    return classes


def _text(scores: pa.Table, failed: Mapping[str, Sequence[str]]) -> str:
    """Formats an experiment as text: every metric of each labeler, alongside the trivial baselines.

    Metrics that fail a test of scores are marked with its name.
    """
    lines: dict[str, list[str]] = {}
    for row in scores.to_pylist():
        if " − " not in row["system"]:
            lines.setdefault(row["metric"], []).append(f"{row['system']} {row['value']:.3g}")
    title = scores["experiment"][0].as_py() if len(scores) else "no scores"
    return "\n".join(
        [title, *(f"  {metric}{_mark(failed.get(metric))}: {' · '.join(values)}" for metric, values in lines.items())]
    )


def _mark(tests: Sequence[str] | None) -> str:
    """What stands behind the name of a metric that fails tests."""
    return f" (fails: {', '.join(tests)})" if tests else ""
