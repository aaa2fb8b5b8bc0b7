"""Generalization as data: settings, captioners with their units, and the stages that declare its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from milan_ray.annotations.splits import Split
from milan_ray.captioner.fit import Sizes
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.config import Fingerprint, TrainingConfig
from milan_ray.engine.stage import Known, Output, Stage, due
from milan_ray.schema import ENCODINGS, GENERALIZATION, HELD_OUT, SCORES, SPLITS, TRAINING
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.training import TrainingJob, annotations_read
from milan_ray.storage import Storage
from milan_ray.studies.generalization.statistics import TEST, TRAIN, Unit

KERNEL_VERSION = "generalization-1"

NAME = "generalization"
"""Default name of the experiment."""


@dataclass(frozen=True)
class GeneralizationConfig:
    """How captioners are trained and judged; defaults are the paper's.

    Attributes:
        trials: Captioners per split; they differ in seed, and where one network's units are divided, in the division.
        share: Share of units held out where one network's are divided.
        within: Optimisation there, where units are few; its seed is the first trial's.
        training: Optimisation elsewhere; likewise.
        sizes: Sizes of the models.
        beam_size: Width of the beam; None takes the captioner's own, 50.
        lam: λ; None takes the captioner's own, .2.
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
    """What to train and to judge.

    Attributes:
        source: Source of the annotations.
        layers: Annotated model → its layers to take.
        splits: What trains and what judges.
        encoder: Encoder of their encodings.
        config: How.
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
    """One captioner and what it is judged on.

    Attributes:
        split: What trains and what judges.
        number: Which of several such captioners.
        train: Units that it is trained on.
        test: Units that it is judged by.
        training: How it is trained; without GPUs.
    """

    split: Split
    number: int
    train: list[Unit]
    test: list[Unit]
    training: TrainingJob


class Splits(Stage):
    """The units that train and judge captioners, a table per split.

    Args:
        experiment: Name of the experiment.
        trials: All captioners.
    """

    table, name, title = SPLITS, "splits", "splits"

    def __init__(self, experiment: str, trials: Sequence[Trial]) -> None:
        self._experiment = experiment
        self._units: dict[str, list[tuple[int, str, str, str, int]]] = {}
        for trial in trials:
            units = self._units.setdefault(trial.split.name, [])
            units += [(trial.number, TRAIN, *unit) for unit in trial.train]
            units += [(trial.number, TEST, *unit) for unit in trial.test]

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per split, which follows from its units."""
        for split, units in self._units.items():
            fingerprint = Fingerprint.of({"kernel": KERNEL_VERSION, "units": units})
            yield Output({"experiment": self._experiment, "split": split}, fingerprint)

    def run(self, storage: Storage) -> None:
        """Writes the tables that are missing or stale."""
        for output in due(self, storage):
            units = self._units[output.keys["split"]]
            columns = dict(zip(("trial", "part", "model", "layer", "unit"), zip(*units, strict=True), strict=True))
            names = {key: [value] * len(units) for key, value in output.keys.items()}
            storage.write(SPLITS, SPLITS.table({**names, **columns}), output.fingerprint, **output.keys)


class HeldOut(Stage):
    """Descriptions of held-out units by one captioner.

    Args:
        job: The experiment.
        trial: The captioner.
    """

    table, name, title = HELD_OUT, "held_out", "held-out descriptions"

    def __init__(self, job: GeneralizationJob, trial: Trial) -> None:
        self._job, self._trial = job, trial

    def outputs(self, known: Known) -> Iterator[Output]:
        """The descriptions, which follow from the captioner, encodings and annotations."""
        job, trial = self._job, self._trial
        layers = (*trial.training.layers, *job.pairs(trial.split.test_models))
        quirks = {} if job.config.quirks == NO_QUIRKS else {"quirks": job.config.quirks}
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


class SplitScores(Stage):
    """How well held-out units are described, a table per split.

    Args:
        job: The experiment.
        language: Name of the spaCy pipeline that reads descriptions.
    """

    table, name, title = GENERALIZATION, "generalization", "scores"

    def __init__(self, job: GeneralizationJob, language: str) -> None:
        self._job, self._language = job, language

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per split, which follows from what its captioners say."""
        job = self._job
        for split in job.splits:
            public = {"experiment": job.name, "split": split.name}
            trials = range(job.config.trials)
            inputs = {
                "kernel": KERNEL_VERSION,
                "held_out": [known.config(HELD_OUT, **public, trial=str(trial)) for trial in trials],
                "bertscore": job.bert_score and Path(job.bert_score).name,
                "language": self._language,
            }
            yield Output(public, Fingerprint.of(inputs))


class ScoreTable(Stage):
    """The table of scores that the report shows.

    Args:
        job: The experiment.
    """

    table, name, title = SCORES, "scores", "table of scores"

    def __init__(self, job: GeneralizationJob) -> None:
        self._job = job

    def outputs(self, known: Known) -> Iterator[Output]:
        """The table, which follows from the scores of the splits."""
        experiment = self._job.name
        splits = [known.config(GENERALIZATION, experiment=experiment, split=split.name) for split in self._job.splits]
        yield Output({"experiment": experiment}, Fingerprint.of({"kernel": KERNEL_VERSION, "splits": splits}))
