"""Captioners for benchmarks: of the paper's sizes, untrained, or trained on human annotations."""

from __future__ import annotations

import csv
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milan_ray.benchmarks.harness import Options
from milan_ray.captioner import training
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import CONFIG, WEIGHTS, from_bytes, to_bytes
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.progress import Progress, say
from milan_ray.world.annotators import annotate_unit
from milan_ray.world.scenes import SIDE, concept_maps, make_scene

EXEMPLARS = 15

ANNOTATIONS = "milannotations_resnet152_imagenet.csv"
"""MILANNOTATIONS' largest set of human annotations of one model; columns layer, unit, summary."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a captioner and its search.

    Attributes:
        words: Vocabulary size.
        encoder: Name of the encoder.
        features: Size of the encoder's feature of one exemplar.
        hidden: Size of the LSTM state.
        units: Number of annotated units to train on.
        epochs: Training epochs of each model.
        beam_size: Beams per unit.
        length: Maximum number of tokens.
    """

    words: int = 2000
    encoder: str = "resnet101"
    features: int = 3904
    hidden: int = 512
    units: int = 100
    epochs: int = 20
    beam_size: int = 50
    length: int = 15

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """Returns the paper's sizes, or tiny ones for short runs."""
        return cls(60, "resnet18", 1024, 16, 12, 2, 5, 6) if options.short else cls()


def random_features(count: int, size: int) -> Tensor:
    """Generates fixed random features, similar within a unit and positive as after a ReLU: (count, k, F)."""
    generator = torch.Generator().manual_seed(1)
    unit, exemplar = (torch.randn(count, k, size, generator=generator) for k in (1, EXEMPLARS))
    return (unit + 0.5 * exemplar).clamp(min=0)


def untrained(sizes: Sizes) -> Captioner:
    """Builds a captioner with random weights, whose beams never finish."""
    torch.manual_seed(0)
    words = tuple(f"word{number}" for number in range(sizes.words))
    decoder = Decoder(DecoderConfig(sizes.words, sizes.features, hidden_size=sizes.hidden))
    lm = LanguageModel(LMConfig(sizes.words, hidden_size=sizes.hidden))
    return Captioner(Indexer(Vocabulary(words)), decoder, lm, sizes.encoder, None, sizes.length, sizes.beam_size)


def trained(options: Options, sizes: Sizes) -> Captioner:
    """Trains a captioner on annotations of some units, with random features.

    The captioner is cached in the system's temporary folder, under a hash of its training data and sizes.
    """
    texts = _annotations(options, sizes)
    identity = hashlib.sha256(repr((sizes, texts)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"milan-ray-benchmark-{identity}"
    if (folder / CONFIG).is_file():
        return from_bytes({name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)})
    say(f"training a captioner on {sizes.units} units, kept in {folder}")
    captioner = _train(texts, sizes)
    folder.mkdir(exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_bytes(to_bytes(captioner)[name])
    return captioner


def _annotations(options: Options, sizes: Sizes) -> list[list[str]]:
    """Reads human annotations of units if given, or else generates annotations with the synthetic world."""
    if options.annotations is None:
        return [_invented(number) for number in range(sizes.units)]
    file = options.annotations / ANNOTATIONS
    if not file.is_file():
        raise MilanError(f"no human annotations at {file}; give the folder that holds MILANNOTATIONS' {ANNOTATIONS}.")
    summaries: dict[tuple[str, str], list[str]] = defaultdict(list)
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            summaries[row["layer"], row["unit"]].append(row["summary"])
    return list(summaries.values())


def _invented(number: int) -> list[str]:
    """Generates the synthetic world's annotations for the region of one concept in a scene."""
    maps = concept_maps(make_scene("train", number))
    shown = sorted(maps)[number % len(maps)]
    return [annotation.text for annotation in annotate_unit(maps[shown].reshape(1, SIDE, SIDE), [maps], str(number))]


def _train(texts: list[list[str]], sizes: Sizes) -> Captioner:
    vocabulary = Vocabulary(Vocabulary.build(texts).words[: sizes.words])  # all units' words, for a realistic size
    indexer, words = Indexer(vocabulary), len(vocabulary)
    features = random_features(sizes.units, sizes.features)
    # Annotations are cut to the maximum length of descriptions, because longer ones would only enlarge batches.
    captions = [
        (unit, indexer.words(indexer.tokenizer(text))[: sizes.length - 1])
        for unit, annotations in enumerate(texts[: sizes.units])
        for text in annotations
    ]
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(words, sizes.features, hidden_size=sizes.hidden))
    lm = LanguageModel(LMConfig(words, hidden_size=sizes.hidden))
    config = TrainingConfig()
    optimizers = training.optimizer_for(decoder, config), training.optimizer_for(lm, config)
    pad = indexer.ids.pad

    def decoder_batches(epoch: int) -> Iterator[training.DecoderBatch]:
        for batch in training.shuffled_batches(captions, config.decoder_batch_size, 0, epoch):
            units, rows = zip(*batch, strict=True)
            yield training.collate_decoder(features[list(units)], rows, indexer)

    def lm_batches(epoch: int) -> Iterator[training.LMBatch]:
        for batch in training.shuffled_batches(captions, config.lm_batch_size, 0, epoch):
            yield training.collate_lm([row for _, row in batch], indexer)

    with Progress("training", sizes.epochs, "epochs") as progress:
        for epoch in range(sizes.epochs):
            training.lm_epoch(lm, optimizers[1], lm_batches(epoch), pad, config)
            training.decoder_epoch(decoder, optimizers[0], decoder_batches(epoch), pad, config)
            progress.advance()
    return Captioner(indexer, decoder, lm, sizes.encoder, None, sizes.length, sizes.beam_size)
