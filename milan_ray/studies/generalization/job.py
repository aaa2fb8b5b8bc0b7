"""Generalization: settings, captioners with their units, and the stages that declare its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from milan_ray.annotations.splits import Split
from milan_ray.captioner.fit import Sizes
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.captioner.rerank import CHOICE_VERSION
from milan_ray.config import Fingerprint, TrainingConfig
from milan_ray.engine.stage import Known, Output, Stage, due
from milan_ray.schema import ENCODINGS, GENERALIZATION, HELD_OUT, SCORES, SPLITS, TRAINING
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.training import TrainingJob, annotations_read
from milan_ray.storage import Storage
from milan_ray.studies.generalization.statistics import TEST, TRAIN
from milan_ray.studies.tables import Unit, write_frame

KERNEL_VERSION = "generalization-1"

NAME = "generalization"
"""Default name of the experiment."""


@dataclass(frozen=True)
class GeneralizationConfig:
    """How captioners are trained and judged; defaults are the paper's.

    Attributes:
        trials: Captioners per split. They differ in their seed and, within one network, in the division of its units.
        share: Share of units held out within one network.
        within: Optimisation within one network, where units are few; its seed is the first trial's.
        training: Optimisation of all other captioners; its seed is the first trial's.
        sizes: Sizes of the models.
        beam_size: Width of the beam; None uses the captioner's own, 50.
        lam: λ; None uses the captioner's own, .2.
        quirks: Defects of the reference to reproduce in log p(d).
    """

    trials: int = 5
    share: float = 0.1
    within: TrainingConfig = field(default_factory=lambda: TrainingConfig(patience=10))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sizes: Sizes = field(default_factory=Sizes)
    beam_size: int | None = None
    lam: float | None = None
    quirks: Quirks = NO_QUIRKS


@dataclass(frozen=True)
class GeneralizationJob:
    """Captioners to train and to judge.

    Attributes:
        source: Source of the annotations.
        layers: Annotated model → its layers.
        splits: Models that train and models that judge.
        encoder: Encoder of the encodings.
        config: Settings.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        name: Name of the experiment in the tables; the captioners are called NAME-SPLIT-TRIAL.
        workers: Data-parallel workers of each training.
        memory_limit: Bytes of features that a training worker keeps in memory.
    """

    source: str
    layers: Mapping[str, Sequence[str]]
    splits: tuple[Split, ...]
    encoder: EncoderRef
    config: GeneralizationConfig = field(default_factory=GeneralizationConfig)
    bert_score: str | None = None
    name: str = NAME
    workers: int = 1
    memory_limit: int = 2 * 2**30

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the splits name."""
        return tuple(dict.fromkeys(model for split in self.splits for model in split.models))

    def pairs(self, models: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """(model, layer) pairs of models."""
        return tuple((model, layer) for model in models for layer in self.layers[model])


@dataclass(frozen=True)
class Trial:
    """One captioner and the units that judge it.

    Attributes:
        split: Its split.
        number: Its number among the captioners of the split.
        train: Units that it is trained on.
        test: Units that it is judged on.
        training: Its training, without GPUs.
    """

    split: Split
    number: int
    train: list[Unit]
    test: list[Unit]
    training: TrainingJob


@dataclass(frozen=True)
class Splits(Stage):
    """The units that train and judge captioners, a table per split.

    Attributes:
        experiment: Name of the experiment.
        trials: All captioners.
    """

    table, name, title = SPLITS, "splits", "splits"

    experiment: str
    trials: Sequence[Trial]

    def _units(self) -> dict[str, list[tuple[int, str, str, str, int]]]:
        """Split → trial, part, model, layer and number of its units."""
        units: dict[str, list[tuple[int, str, str, str, int]]] = {}
        for trial in self.trials:
            for part, members in ((TRAIN, trial.train), (TEST, trial.test)):
                units.setdefault(trial.split.name, []).extend((trial.number, part, *unit) for unit in members)
        return units

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per split, determined by its units."""
        for split, units in self._units().items():
            fingerprint = Fingerprint.of({"kernel": KERNEL_VERSION, "units": units})
            yield Output({"experiment": self.experiment, "split": split}, fingerprint)

    def run(self, storage: Storage) -> None:
        """Writes the tables that are missing or stale."""
        units = self._units()
        for output in due(self, storage):
            columns = ["trial", "part", "model", "layer", "unit"]
            rows = pl.DataFrame(units[output.keys["split"]], columns, orient="row")
            write_frame(storage, SPLITS, rows, output.fingerprint, **output.keys)


@dataclass(frozen=True)
class HeldOut(Stage):
    """Descriptions of held-out units by one captioner.

    Attributes:
        job: The experiment.
        trial: The captioner.
    """

    table, name, title = HELD_OUT, "held_out", "held-out descriptions"

    job: GeneralizationJob
    trial: Trial

    def outputs(self, known: Known) -> Iterator[Output]:
        """The descriptions, determined by the captioner, encodings and annotations."""
        job, trial = self.job, self.trial
        layers = (*trial.training.layers, *job.pairs(trial.split.test_models))
        quirks: dict[str, object] = {}
        if job.config.quirks != NO_QUIRKS:
            quirks["quirks"] = job.config.quirks.of_search()
        if not job.config.quirks.plain_choice:
            quirks["choice"] = CHOICE_VERSION
        yield Output(
            {"experiment": job.name, "split": trial.split.name, "trial": str(trial.number)},
            Fingerprint.of(
                {
                    "kernel": KERNEL_VERSION,
                    "captioner": known.config(TRAINING, decoder=trial.training.name),
                    "encodings": [
                        known.config(ENCODINGS, encoder=job.encoder.name, model=model, layer=layer)
                        for model, layer in layers
                    ],
                    "annotations": annotations_read(known.storage, job.source, layers),
                    "units": [trial.train, trial.test],
                    "beam_size": job.config.beam_size,
                    "lam": job.config.lam,
                    **quirks,
                }
            ),
        )


@dataclass(frozen=True)
class SplitScores(Stage):
    """Scores of the descriptions of held-out units, a table per split.

    Attributes:
        job: The experiment.
        language: Name of the spaCy pipeline that reads descriptions.
    """

    table, name, title = GENERALIZATION, "generalization", "scores"

    job: GeneralizationJob
    language: str

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per split, determined by the descriptions of its captioners."""
        job = self.job
        for split in job.splits:
            keys = {"experiment": job.name, "split": split.name}
            inputs = {
                "kernel": KERNEL_VERSION,
                "held_out": [known.config(HELD_OUT, **keys, trial=str(trial)) for trial in range(job.config.trials)],
                "bertscore": job.bert_score and Path(job.bert_score).name,
                "language": self.language,
            }
            yield Output(keys, Fingerprint.of(inputs))


@dataclass(frozen=True)
class ScoreTable(Stage):
    """The table of scores that the report shows.

    Attributes:
        job: The experiment.
    """

    table, name, title = SCORES, "scores", "table of scores"

    job: GeneralizationJob

    def outputs(self, known: Known) -> Iterator[Output]:
        """The table, determined by the scores of the splits."""
        experiment = self.job.name
        splits = [known.config(GENERALIZATION, experiment=experiment, split=split.name) for split in self.job.splits]
        yield Output({"experiment": experiment}, Fingerprint.of({"kernel": KERNEL_VERSION, "splits": splits}))
