"""``milan-ray annotations collect``, ``answers`` and ``statistics``: collects human annotations and analyses them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import flag, numbers, string, strings, table_name
from milan_ray.cli.build_configs import absolute, bert_score_folder, open_storage
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.scoring.agreement import TextScore

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


def _collect(args: argparse.Namespace) -> int:
    from milan_ray.stages.annotations_collect import run_collect

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


def _answers(args: argparse.Namespace) -> int:
    from milan_ray.annotations.cleaning import read_tables
    from milan_ray.annotations.collection import passed_workers
    from milan_ray.stages.annotations_collect import agreement_report, run_answers

    if (args.qualification is None) != (args.key is None):
        raise MilanError("--qualification and --key go together: the answers to the test, and the right ones.")
    qualified = None
    if args.qualification is not None:
        qualified = passed_workers(Path(args.qualification), Path(args.key))
        say(f"{len(qualified)} people passed the qualification test")
    storage = open_storage(args)
    storage.check_writable()
    annotations = run_answers(
        storage, [Path(file) for file in args.files], args.source,
        tables=read_tables(Path(args.tables)) if args.tables else None,
        keep_rejected=args.keep_rejected, qualified=qualified,
    )  # fmt: skip
    say(agreement_report(annotations, *_score(args)))
    say(f"train with them: jobs.train --annotations {args.source}")
    note(
        args, f"{len(annotations.texts)} annotations brought in", source=args.source, annotations=len(annotations.texts)
    )
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
