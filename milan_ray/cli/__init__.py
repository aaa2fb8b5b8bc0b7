"""The command line: ``milan-ray VERB …``, and ``python -m jobs.VERB …`` for ``ray job submit``.

Each subcommand (verb) has a module, whose ``add(parser)`` adds its options and whose ``run(args)`` runs it. Only
subcommands that need Torch and Ray import them, after :func:`milan_ray.runtime.prepare` has set up their environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NoReturn

from milan_ray import hub, runtime
from milan_ray.cli import refusals
from milan_ray.cli.arguments import Help
from milan_ray.cli.parsing import Parser
from milan_ray.cli.summary import Summary, show_downloads
from milan_ray.errors import MilanError, reason
from milan_ray.progress import say, speaking

SUMMARIES = {
    "models": "list models, or one model's layers",
    "exemplars": "find every unit's exemplars and masks",
    "describe": "describe every unit of models",
    "label": "label every unit by its probe's concept maps, or from a list of concepts",
    "features": "fit features to a layer, to be described like units",
    "train": "train a captioner on annotated units",
    "annotations": "bring published annotations in, out, and into shape",
    "dnd": "label every unit by captions and drawn images (Describe-and-Dissect)",
    "export": "write a captioner as a checkpoint of the reference implementation",
    "tune": "choose λ, beam size and strategy on annotated units",
    "demo": "run everything on the built-in world",
    "score": "score descriptions on images that did not make them",
    "generalize": "train captioners on some networks and judge them on others",
    "baselines": "compare MILAN with labels from concept maps on networks new to it",
    "compare": "compare all labelers on the same units",
    "search": "find units by their descriptions",
    "diff": "compare what the units of two networks say",
    "analyze": "ablate units in the order of what is said of them",
    "edit": "remove units that are described by some words",
    "effects": "measure what ablating and amplifying units does to classes",
    "audit": "count units that name what was blurred out, in pairs of networks",
    "paste": "make adversarial images of what units fire at",
    "paper": "run the paper's experiments on the built-in world",
    "report": "write the HTML report of a storage",
    "doctor": "say what is installed and found, what is missing, and how to get it",
    "plan": "estimate what a big run costs, from a short measured sample",
    "status": "list what a storage holds, stale, orphaned and unfinished",
    "benchmark": "compare the time of a stage with that of its bare computation",
}
"""Subcommand → its summary; the module of that name has the functions that add its options and run it."""

Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]


def _verb(name: str) -> Verb:
    module = importlib.import_module(f"milan_ray.cli.{name}")
    return SUMMARIES[name], module.add, module.run


VERBS: dict[str, Verb] = {name: _verb(name) for name in SUMMARIES}
"""Subcommand → its summary, the function that adds its options, and the function that runs it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: The command line without the program's name; None uses ``sys.argv``.

    Returns:
        Exit status: 0 if everything was done, 1 if something failed, 2 if the file of ``--config`` is invalid, 130 if
        interrupted.
    """
    try:
        args = build_parser().read(sys.argv[1:] if arguments is None else arguments)
    except MilanError as error:
        say(f"error: {error}", level="error")
        return 2
    runtime.prepare(getattr(args, "address", None))
    args.summary = Summary(" ".join([args.verb, *filter(None, [getattr(args, "action", None)])]))
    with speaking(args.log, args.quiet):
        summarised = args.json is True and not args.prints_result
        with contextlib.redirect_stdout(sys.stderr) if summarised else contextlib.nullcontext():
            status = _run(args)
        if args.prints_result:
            args.summary.what = None
        args.summary.say()
        if summarised or (args.json is True and args.summary.error is not None):
            print(args.summary.json(status))
    return status


def job(verb: str) -> NoReturn:
    """Runs a subcommand with this process's arguments, and exits: the main program of ``jobs.VERB``."""
    sys.exit(main([verb, *sys.argv[1:]]))


def build_parser() -> Parser:
    """Builds the parser of all subcommands."""
    parser = Parser(prog="milan-ray", description="Natural-language descriptions of every unit of vision models.")
    parser.add_argument("--version", action="version", version=f"milan-ray {version('milan-ray')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (summary, add, run) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".", formatter_class=Help)
        add(verb)
        verb.set_defaults(run=run)
    parser.tell_defaults()
    return parser


def _run(args: argparse.Namespace) -> int:
    """Runs the subcommand; reports an error in one sentence, or with its traceback if ``--debug`` is given."""
    try:
        refusals.check(args)
        status = _dry_run(args) if getattr(args, "dry_run", False) else args.run(args)
        sys.stdout.flush()
        return status
    except MilanError as error:
        if args.debug:
            raise
        args.summary.error = str(error)
    except KeyboardInterrupt:
        args.summary.error = "interrupted; run the same command again to go on from here."
        say(args.summary.error, level="error")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and args.prints_result:  # the reader closed the pipe, as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if args.debug:
            raise
        args.summary.error = _unforeseen(error)
    say(f"error: {args.summary.error}", level="error")
    return 1


def _dry_run(args: argparse.Namespace) -> int:
    """Prints what the subcommand would do. Downloads nothing and writes nothing, not even bytecode of plug-ins."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with hub.dry() as absent:
            try:
                return int(args.run(args))
            except hub.WouldDownload:
                return show_downloads(args, absent)
    finally:
        sys.dont_write_bytecode = before


def _unforeseen(error: Exception) -> str:
    """Describes an unexpected error: an OS error, or a bug in this package, whose traceback is saved to a file."""
    cause = getattr(error, "cause", None) or error  # Ray's errors carry the worker's exception
    if isinstance(cause, OSError):
        return (
            f"{reason(cause)}; see to that and run the same command again, which goes on from here (--debug shows "
            "where it happened)."
        )
    handle, file = tempfile.mkstemp(prefix="milan-ray-", suffix=".txt")
    with open(handle, "w", encoding="utf-8") as out:
        traceback.print_exception(type(error), error, error.__traceback__, file=out)
    return (
        f"{type(cause).__name__}: {reason(cause)}; this should not happen: please report it with the traceback, which "
        f"is in {file} (--debug shows it at once)."
    )
