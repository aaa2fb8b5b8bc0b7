"""A captioner of one's own from text about units, and how well it describes units that it has not seen.

    python examples/own_text.py --model mine --plugin mine.py --probe ~/photos --train train.csv --held held.csv \
        --encoder resnet18 --storage ~/run

Both files have columns layer, unit, summary: the first trains, the second judges. docs/photographs.md runs it on
AlexNet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from milan_ray import cli
from milan_ray.annotations.layout import read_annotations
from milan_ray.annotations.published import kept_annotations
from milan_ray.schema import DESCRIPTIONS, ENCODINGS
from milan_ray.scoring.evaluation import best_constant, evaluate_text, nearest_copy, with_trivial_rows
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.stages.encodings import unit_features
from milan_ray.storage import Storage

SOURCE = "own"
"""Name of the annotations, and of the captioner that learns from them."""

METRICS = ("bertscore-f", "rouge-l-f", "bleu-2")

Unit = tuple[str, int]
"""Layer and unit."""


def texts_of(path: str) -> dict[Unit, list[str]]:
    """Reads a CSV: unit → what is said of it."""
    return {unit: [row.text for row in rows] for unit, rows in kept_annotations(read_annotations(Path(path))).items()}


def mean_encodings(storage: Storage, encoder: str, model: str, layers: set[str]) -> dict[Unit, np.ndarray]:
    """Returns the mean encoding of each unit's exemplars, float32 (F,)."""
    means: dict[Unit, np.ndarray] = {}
    for layer in layers:
        table = storage.read(ENCODINGS, ["unit", "rank", "feature"], encoder=encoder, model=model, layer=layer)
        means |= {(layer, unit): features.mean(axis=0) for unit, features in unit_features(table).items()}
    return means


def held_out_table(
    storage: Storage,
    model: str,
    encoder: str,
    train_texts: dict[Unit, list[str]],
    held_texts: dict[Unit, list[str]],
) -> pl.DataFrame:
    """Compares descriptions of units that were not trained on with their text, beside trivial baselines."""
    said: dict[str, dict[Unit, str]] = {}
    for labeler in ("milan", "milan-pdE"):
        rows = [
            row
            for layer in {layer for layer, _ in held_texts}
            for row in storage.read(DESCRIPTIONS, labeler=labeler, model=model, layer=layer).to_pylist()
        ]
        said[labeler] = {(row["layer"], row["unit"]): row["description"] for row in rows}
    units = [unit for unit in held_texts if unit in said["milan"]]
    means = mean_encodings(storage, encoder, model, {layer for layer, _ in (*train_texts, *units)})
    nearest = nearest_copy(
        np.stack([means[unit] for unit in train_texts]),
        [texts[0] for texts in train_texts.values()],
        np.stack([means[unit] for unit in units]),
    )
    predictions = {labeler: [texts[unit] for unit in units] for labeler, texts in said.items()}
    systems = with_trivial_rows(predictions, best_constant(list(train_texts.values())), nearest)
    folder = minilm_directory()
    scores = evaluate_text(
        f"held out of {model}", systems, [held_texts[unit] for unit in units], BertScore(folder) if folder else None
    )
    return pl.DataFrame(pl.from_arrow(scores))


def main() -> None:
    """Runs the jobs, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "probe", "train", "held", "encoder", "storage"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--encoder-weights")
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--epochs")
    parser.add_argument("--beam-size", help="fewer than 50 where the text has fewer words")
    args = parser.parse_args()
    train_texts, held_texts = texts_of(args.train), texts_of(args.held)
    if seen := train_texts.keys() & held_texts.keys():
        raise SystemExit(f"{len(seen)} units are in both files, the first {min(seen)}: take them out of one.")
    plugins = [word for plugin in args.plugin for word in ("--plugin", plugin)]
    where = ["--storage", args.storage]
    weights = ["--weights", args.weights] if args.weights else []
    encoder = ["--encoder", args.encoder]
    encoder += ["--encoder-weights", args.encoder_weights] if args.encoder_weights else []
    epochs = ["--epochs", args.epochs] if args.epochs else []
    beam = ["--beam-size", args.beam_size] if args.beam_size else []
    layers = ["--layers", *sorted({layer for layer, _ in held_texts})]
    for command in (
        ["exemplars", "--model", args.model, *weights, "--probe", args.probe, *plugins, *where],
        ["annotations", "import", args.train, "--model", args.model, "--source", SOURCE, *where],
        ["train", "--annotations", SOURCE, *encoder, *epochs, *plugins, *where],
        ["describe", "--model", args.model, "--decoder", SOURCE, *layers, *beam, *plugins, *where],
    ):
        print("milan-ray", *command, flush=True)
        if cli.main(command):
            raise SystemExit(1)
    table = held_out_table(Storage(args.storage), args.model, args.encoder, train_texts, held_texts)
    for metric in METRICS:
        for row in table.filter(pl.col("metric") == metric, pl.col("n") > 0).to_dicts():
            figures = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{metric:12} {row['system']:22} {figures} n = {row['n']}")


if __name__ == "__main__":
    main()
