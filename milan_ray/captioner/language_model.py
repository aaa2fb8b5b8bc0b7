"""Trains the language model p(d) on annotations and measures its perplexity on held-out units.

python -m milan_ray.captioner.language_model annotations.csv split.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from milan_ray.annotations.layout import read_annotations
from milan_ray.captioner import training
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Tokenizer, Vocabulary
from milan_ray.captioner.training import EarlyStopping
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.progress import say

SPLIT = ("train", "val")

Split = tuple[list[list[str]], list[list[str]]]
"""The annotations of each train unit, and of each validation unit."""


def read_split(annotations: Path, split: Path) -> Split:
    """Reads annotations and splits them by units.

    Args:
        annotations: A CSV with columns layer, unit, summary.
        split: JSON with lists ``train`` and ``val`` of [layer, unit].

    Raises:
        MilanError: A file cannot be read, or a part of the split has no annotations.
    """
    texts: dict[tuple[str, int], list[str]] = {}
    for row in read_annotations(annotations):
        texts.setdefault((row.layer, row.unit), []).append(row.text)
    try:
        parts = json.loads(split.read_text(encoding="utf-8"))
        units = [[(str(layer), int(unit)) for layer, unit in parts[name]] for name in SPLIT]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MilanError(
            f"{split} is not a split ({error!r}): give JSON with lists train and val of [layer, unit]."
        ) from error
    train, validation = ([texts[unit] for unit in part if unit in texts] for part in units)
    if not train or not validation:
        raise MilanError(f"{split} names no annotated units of {annotations} in one of {', '.join(SPLIT)}.")
    return train, validation


def train_language_model(split: Split, config: TrainingConfig, sizes: LMConfig | None = None) -> pl.DataFrame:
    """Trains the language model in this process, as the pipeline does; its vocabulary is that of the train units.

    Args:
        split: Annotations to train on and to validate with.
        config: Hyperparameters.
        sizes: Sizes of the model; its number of words is ignored. The paper's by default.

    Returns:
        A row per epoch: epoch, train_loss (mean over batches), validation (nats per token, words and stop, unknown
        words as ``<unk>``), perplexity, seconds, kept.
    """
    indexer = Indexer(Vocabulary.build(split[0], Tokenizer()))
    train, validation = ([indexer.words(indexer.tokenizer(text)) for texts in part for text in texts] for part in split)
    torch.manual_seed(config.seed)
    model = LanguageModel(replace(sizes or LMConfig(0), words=len(indexer.vocabulary)))
    optimizer, stopping = training.optimizer_for(model, config), EarlyStopping(config.patience)
    pad, size = indexer.ids.pad, config.lm_batch_size
    held_out = [training.collate_lm(validation[i : i + size], indexer) for i in range(0, len(validation), size)]
    rows: list[dict[str, float]] = []
    say(f"language model: {len(train)} captions to learn, {len(validation)} held out, {len(indexer.vocabulary)} words")
    for epoch in range(config.max_epochs):
        started = time.monotonic()
        batches = training.shuffled_batches(train, size, config.seed, epoch)
        loss = training.lm_epoch(
            model, optimizer, (training.collate_lm(batch, indexer) for batch in batches), pad, config
        )
        nll = training.lm_loss(model, held_out, pad)
        seconds = time.monotonic() - started
        rows.append({"epoch": epoch + 1, "train_loss": loss, "validation": nll, "seconds": seconds})
        say(f"  epoch {epoch + 1}: train {loss:.3f}, validation {nll:.3f} nats per token, {seconds:.0f} s")
        if stopping.update(epoch + 1, -nll, model):
            break
    return pl.DataFrame(rows).with_columns(
        perplexity=pl.col("validation").exp(), kept=pl.col("epoch") == stopping.kept_epoch
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the perplexity on held-out units; returns the exit status."""
    config = TrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m milan_ray.captioner.language_model", description=__doc__)
    parser.add_argument("annotations", type=Path, help="CSV with columns layer, unit, summary")
    parser.add_argument("split", type=Path, help="JSON with lists train and val of [layer, unit]")
    parser.add_argument("--epochs", type=int, default=config.max_epochs, help="epochs at most")
    parser.add_argument("--seed", type=int, default=config.seed, help="of weights, dropout and order")
    args = parser.parse_args(arguments)
    try:
        split = read_split(args.annotations, args.split)
        epochs = train_language_model(split, replace(config, max_epochs=args.epochs, seed=args.seed))
    except MilanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    best = epochs.row(by_predicate=pl.col("kept"), named=True)
    print(
        f"validation: {best['validation']:.3f} nats per token, perplexity {math.exp(best['validation']):.1f} "
        f"(epoch {best['epoch']} of {len(epochs)}, {epochs['seconds'].sum():.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
