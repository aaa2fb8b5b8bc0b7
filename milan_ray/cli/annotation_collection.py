"""``milan-ray annotations collect``, ``answers`` and ``statistics``: collects human annotations and analyses them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import choice, flag, fraction, integer, numbers, string, strings, table_name
from milan_ray.cli.build_configs import absolute, bert_score_folder, cluster, image_text_ref, open_storage, probe_ref
from milan_ray.cli.refusals import CLUSTER, refuse
from milan_ray.cli.summary import note
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.scoring.agreement import TextScore
    from milan_ray.storage import Storage

AddAction = Callable[[str, str], argparse.ArgumentParser]
"""Creates the parser of an action from its name and summary."""


def add_to(action: AddAction) -> None:
    """Adds these actions to the subcommand."""
    collect = action("collect", "Write pictures of exemplars and task files for people to describe")
    string(collect, "model", "MODEL", "a model with exemplars in the storage")
    string(collect, "folder", "DIR", "folder to be made")
    strings(collect, "--layers", "LAYER", "only these layers")
    string(collect, "--units", "1,5,7-12", "only these units of every layer", (), type=numbers)
    string(collect, "--url", "PREFIX", "where the folder will be served (https://…/ for Mechanical Turk)", "")
    string(
        collect, "--qualification", "FILE", "test for people, a CSV: model, layer, unit, right, wrong (wrong|wrong|…)"
    )
    _add_ratings(collect)
    answers = action("answers", "Bring people's answers into the storage, cleaned, and say how much they agree")
    strings(answers, "files", "FILE", "Mechanical Turk's results (.csv) or Label Studio's export (.json)")
    string(
        answers, "--source", "SOURCE", "name of the annotations; replaces earlier ones", type=table_name, required=True
    )
    string(answers, "--tables", "JSON", "prefixes, substrings, suffixes, exact, words, workers: replacements")
    flag(answers, "--keep-rejected", "keep what was rejected, or skipped")
    string(answers, "--qualification", "FILE", "Label Studio's export of the test: only who passed counts; with --key")
    string(answers, "--key", "FILE", "qualification-key.csv of the tasks")
    statistics = action("statistics", "Count what annotations are like: how many, how long, of which words, agreement")
    statistics.add_argument(
        "set", nargs="?", metavar="CSV", help="a CSV (layer, unit, summary) instead of the storage's annotations"
    )
    strings(statistics, "--model", "NAME", "only these models; of a CSV, its model's name")
    string(statistics, "--source", "SOURCE", "whose annotations (default: the one source there is)")
    options.language(statistics)
    for parser in (answers, statistics):
        string(
            parser, "--bertscore", "FOLDER", "language model for agreement (default: milan-ray[minilm], else ROUGE-L)"
        )
        flag(parser, "--rouge", "agreement by ROUGE-L: seconds instead of minutes")
    for parser in (collect, answers, statistics):
        options.storage(parser)
        options.common(parser)


def _add_ratings(collect: argparse.ArgumentParser) -> None:
    """Adds the options for images to rate."""
    group = collect.add_argument_group("images to rate instead of units to describe (docs/ratings.md)")
    ways = "draw images for people to say whether they show what descriptions name: those that tell most, or any"
    choice(group, "--sampling", ("importance", "uniform"), ways)
    string(group, "--labeler", "NAME", "whose descriptions (default: the one labeler there is)")
    string(group, "--clip", "MODEL", "also prefer images near to the description by CLIP or SigLIP, as jobs.score")
    integer(group, "--images", 100, "draws per unit")
    fraction(group, "--top", 0.01, "share of images that count as exciting a unit")
    choice(group, "--pooling", ("mean", "max"), "value of a unit's map of an image", "mean")
    integer(group, "--seed", 0, "seed of the draws", least=0)
    options.probe(collect, required=False, absent="none; --sampling needs it")
    options.plugins(collect)
    options.resources(collect)


RATING = (
    "labeler", "clip", "images", "top", "pooling", "seed", "probe", "labels", "image_column", "label_column", "max_bad",
    "plugin",
)  # fmt: skip
"""Destinations of the options for images to rate."""


def _collect(args: argparse.Namespace) -> int:
    from milan_ray.stages.annotations_collect import run_collect

    if args.sampling is not None:
        return _collect_ratings(args)
    refuse(args, [*RATING, *CLUSTER], "without --sampling", "give --sampling too")
    folder = Path(absolute("DIR", args.folder))
    qualification = None if args.qualification is None else Path(absolute("--qualification", args.qualification))
    count = run_collect(
        open_storage(args), args.model, folder, layers=args.layers, units=args.units, url=args.url,
        qualification=qualification,
    )  # fmt: skip
    if not args.url:
        say("pictures' addresses are relative; --url says where the folder will be served")
    note(args, f"{count} tasks in {folder} (tasks.csv, label-studio.jsonl)", folder=str(folder), tasks=count)
    return 0


def _collect_ratings(args: argparse.Namespace) -> int:
    from milan_ray.engine.stage import run_stages
    from milan_ray.models.registry import RANDOM
    from milan_ray.models.resolve import resolve_model
    from milan_ray.stages.embeddings import ImageEmbeddings
    from milan_ray.stages.rating_draws import DrawConfig, draw_stages, run_collect_ratings
    from milan_ray.stages.scores import described_layers

    refuse(args, ["qualification"], "with --sampling", "write a test for raters on the platform itself")
    if args.clip is None:
        refuse(args, CLUSTER, "without --clip", "give --clip too")
    if args.probe is None:
        raise MilanError("--sampling draws images of the probe: give the probe of the exemplars with --probe.")
    storage, probe = open_storage(args), probe_ref(args)
    storage.check_writable()
    described = described_layers(storage, [args.model], [args.labeler] if args.labeler else [], args.layers or [])
    labelers = sorted({layer.labeler for layer in described})
    if len(labelers) > 1:
        raise MilanError(f"{args.model} has descriptions of {', '.join(labelers)}: say whose with --labeler.")
    spec = resolve_model(args.model, RANDOM)
    if spec.images is not None:
        raise MilanError(f"{args.model} is a generator: its units have no images of a probe to rate.")
    folder = Path(absolute("DIR", args.folder))
    config = DrawConfig(args.sampling, args.images, args.top, args.pooling, args.seed)
    judge = None if args.clip is None else ImageEmbeddings(image_text_ref(args), probe)
    stages = draw_stages(described, probe, judge, config, tuple(args.units))
    with cluster(args) as resources:
        outputs = run_stages(stages, storage, resources)
    count = run_collect_ratings(storage, folder, outputs, probe, spec, units=args.units, url=args.url)
    if not args.url:
        say("pictures' addresses are relative; --url says where the folder will be served")
    say("ask two people per task: with one, a rater's errors cannot be told from a description's")
    note(args, f"{count} images to rate in {folder} (tasks.csv, label-studio.jsonl)", folder=str(folder), tasks=count)
    return 0


def _answers(args: argparse.Namespace) -> int:
    from milan_ray.annotations.cleaning import read_tables
    from milan_ray.annotations.collection import passed_workers
    from milan_ray.annotations.rating_tasks import are_ratings
    from milan_ray.stages.annotations_collect import agreement_report, run_answers

    if (args.qualification is None) != (args.key is None):
        raise MilanError("--qualification and --key go together: the answers to the test, and the right ones.")
    qualified = None
    if args.qualification is not None:
        qualified = passed_workers(Path(args.qualification), Path(args.key))
        say(f"{len(qualified)} people passed the qualification test")
    storage = open_storage(args)
    storage.check_writable()
    files = [Path(file) for file in args.files]
    if are_ratings(files):
        return _ratings(args, storage, files, qualified)
    annotations = run_answers(
        storage, files, args.source,
        tables=read_tables(Path(args.tables)) if args.tables else None,
        keep_rejected=args.keep_rejected, qualified=qualified,
    )  # fmt: skip
    say(agreement_report(annotations, *_score(args)))
    say(f"train with them: jobs.train --annotations {args.source}")
    note(
        args, f"{len(annotations.texts)} annotations brought in", source=args.source, annotations=len(annotations.texts)
    )
    return 0


def _ratings(args: argparse.Namespace, storage: Storage, files: Sequence[Path], qualified: set[str] | None) -> int:
    """Brings ratings into the storage and prints the scores that follow."""
    from milan_ray.schema import RATED_SCORES
    from milan_ray.stages.rated_scores import ratings_report, run_ratings

    refuse(args, ["tables", "bertscore", "rouge"], "with ratings, which have no text,", "give answers in words")
    imported = run_ratings(storage, files, args.source, keep_rejected=args.keep_rejected, qualified=qualified)
    say(ratings_report(storage, args.source, imported))
    say(f"table: {storage.uri(RATED_SCORES.name)}")
    note(args, f"{imported.ratings} ratings brought in", source=args.source, ratings=imported.ratings)
    return 0


def _statistics(args: argparse.Namespace) -> int:
    from milan_ray.schema import ANNOTATION_STATISTICS
    from milan_ray.studies.annotators.run import file_annotations, run_statistics, stored_annotations, summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline

    storage = open_storage(args)
    storage.check_writable()
    if args.set is None:
        texts = stored_annotations(storage, args.source, args.model)
    elif args.model is not None and len(args.model) > 1:
        raise MilanError("the annotations of a CSV speak of one model: give --model a single name.")
    else:
        texts = file_annotations(absolute("CSV", args.set), args.model and args.model[0], args.source)
    nlp, language = find_spacy_pipeline(args.language)
    score, measure = _score(args)
    say(summary(run_statistics(storage, texts, nlp, language, score, measure), language, measure))
    say(f"table: {storage.uri(ANNOTATION_STATISTICS.name)}")
    note(args, f"{len(texts)} annotations counted", source=texts["source"][0], annotations=len(texts))
    return 0


def _score(args: argparse.Namespace) -> tuple[TextScore, str]:
    """Returns the score that measures agreement, and its name."""
    from milan_ray.studies.annotators.run import find_score

    if args.rouge:
        refuse(args, ["bertscore"], "with --rouge", "leave out --rouge")
        return find_score(None)
    return find_score(bert_score_folder(args))


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "collect": _collect,
    "answers": _answers,
    "statistics": _statistics,
}
"""Action → function that runs it and returns the exit status."""
