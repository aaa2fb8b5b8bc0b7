"""One trial of tuning: a search of descriptions of annotated units, re-ranked with every setting, and scored."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.contrast import logp_given
from milan_ray.captioner.text import readable
from milan_ray.device import resolve_device
from milan_ray.engine import tuner
from milan_ray.schema import CANDIDATES, CONTRAST_ENCODINGS, ENCODINGS
from milan_ray.scoring.text import BertScore, normalize
from milan_ray.stages.captioners import captioner_name, load_captioner
from milan_ray.stages.descriptions import Search, candidates_fingerprint, search_identity
from milan_ray.stages.encodings import unit_features
from milan_ray.stages.training_units import annotated_texts
from milan_ray.stages.tuning_statistics import (
    BEAM_MI,
    GREEDY,
    GREEDY_MI,
    RERANK,
    VALIDATION,
    CachedBertScore,
    Sweep,
    Trial,
    rescored,
    split_units,
    trial_scores,
)
from milan_ray.storage import Storage

DONE, TEXTS = "scores", "texts"
"""Folders of the trials' results, in the work of a sweep; a trial with scores is done."""

UNITS_PER_SEARCH = 64
"""Units per search."""


@dataclass(frozen=True)
class TuningJob:
    """Which captioner to tune, and on what.

    Attributes:
        name: Name of the sweep.
        decoder: Captioner, as :func:`~milan_ray.stages.captioners.load_captioner` finds it.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units are used; ideally none that the captioner was trained on.
        sweep: The settings to try.
        bert_model: Folder of BERTScore's language model; None leaves BERTScore out.
    """

    name: str
    decoder: str
    source: str
    layers: tuple[tuple[str, str], ...]
    sweep: Sweep
    bert_model: str | None = None

    @property
    def experiment(self) -> str:
        """Name of the evaluation on the held-out units, in SCORES."""
        return f"tuning of {captioner_name(self.decoder)} by {self.name}"


@dataclass(frozen=True)
class Unit:
    """An annotated unit.

    Attributes:
        model: Name of its model.
        layer: Module path of its layer.
        unit: Its number.
        references: Its annotations.
    """

    model: str
    layer: str
    unit: int
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The arguments that all trials share.

    Attributes:
        root: Root of the run directory.
        work: Hash of the sweep's work.
        encoder: Encoder of the encodings.
        job: Which captioner to tune, and on what.
        threads: Torch threads of each trial.
        device: Device of the captioner.
    """

    root: str
    work: str
    encoder: str
    job: TuningJob
    threads: int
    device: str

    def annotated(self) -> list[Unit]:
        """All annotated units that have encodings, layer by layer, ascending."""
        storage = Storage(self.root)
        units: list[Unit] = []
        for model, layer in self.job.layers:
            keys = {"model": model, "layer": layer}
            encoded = storage.read(ENCODINGS, ["unit"], encoder=self.encoder, **keys)["unit"].unique().to_pylist()
            annotations = annotated_texts(storage, self.job.source, model, layer)
            for unit in sorted(annotations.keys() & set(encoded)):
                if texts := tuple(text for text in annotations[unit] if normalize(text)):
                    units.append(Unit(model, layer, unit, texts))
        return units

    def bert_score(self) -> BertScore | None:
        """The scorer of BERTScore; None without a language model for it."""
        return _bert_score(self.job.bert_model) if self.job.bert_model else None


@lru_cache(maxsize=1)
def _bert_score(folder: str) -> BertScore:
    """The scorer, cached because a process runs several trials."""
    return CachedBertScore(folder)


def run_trial(config: dict[str, Any], task: Task) -> None:
    """Searches descriptions of all units once, and scores the description that each λ ranks first."""
    given = config["trial"]
    trial = Trial(**{**given, "lams": tuple(given["lams"]), "mus": tuple(given["mus"])})
    storage, sweep = Storage(task.root), task.job.sweep
    if f"{DONE}/{trial.name}" in storage.work_names(task.work, DONE):  # Ray Tune's snapshots may be older
        return
    torch.set_num_threads(task.threads)
    started = time.monotonic()
    units = task.annotated()
    descriptions = _search(storage, task, trial, units)
    searched = time.monotonic()
    storage.put_work(task.work, f"{TEXTS}/{trial.name}", pa.table({"texts": descriptions}))
    references = [unit.references for unit in units]
    splits = split_units(len(units), sweep)
    scores = trial_scores(descriptions, references, splits, task.bert_score(), sweep.samples, sweep.seed)
    seconds = {"search": str(searched - started), "score": str(time.monotonic() - searched)}
    storage.put_work(task.work, f"{DONE}/{trial.name}", scores.to_arrow().replace_schema_metadata(seconds))
    validation = scores.filter(pl.col("metric") == sweep.metric, pl.col("split") == VALIDATION)
    tuner.report({"score": validation["value"].max()})


def _search(storage: Storage, task: Task, trial: Trial, units: Sequence[Unit]) -> list[list[str]]:
    """The descriptions that each setting of a trial ranks first: [setting][unit]."""
    captioner = load_captioner(storage, task.job.decoder).to(str(resolve_device(task.device)))
    descriptions: list[list[str]] = [[] for _ in trial.lams]
    for (model, layer), group in groupby(units, key=lambda unit: (unit.model, unit.layer)):
        numbers = [unit.unit for unit in group]
        of_layer = None
        if trial.strategy == RERANK:
            of_layer = _reranked(storage, captioner, task, trial, model, layer, numbers)
        if of_layer is None:
            keys = {"encoder": task.encoder, "model": model, "layer": layer}
            features = unit_features(storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys))
            contrasts = _contrasts(storage, task, trial, model, layer)
            of_layer = _decoded(
                captioner, trial, [features[unit] for unit in numbers], [contrasts.get(unit) for unit in numbers]
            )
        for texts, more in zip(descriptions, of_layer, strict=True):
            texts += more
    return descriptions


def _reranked(
    storage: Storage, captioner: Captioner, task: Task, trial: Trial, model: str, layer: str, units: Sequence[int]
) -> list[list[str]] | None:
    """Re-ranks a layer's stored candidates; None where the run directory has none of the same search."""
    search = Search(task.job.decoder, trial.beam_size, trial.length)
    encodings = storage.all_units_of(ENCODINGS, encoder=task.encoder, model=model, layer=layer)
    keys = {"decoder": captioner_name(task.job.decoder), "model": model, "layer": layer}
    fingerprint = candidates_fingerprint(search_identity(captioner, search), encodings, ())
    if storage.why(CANDIDATES, fingerprint, **keys):
        return None
    columns = ["unit", "beam_rank", "tokens", "finished", "logp_d_given_e", "logp_d", "text"]
    table = storage.read(CANDIDATES, columns, **keys).sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
    rows = table.filter(pc.is_in(table["unit"], pa.array(units, pa.int32())))
    shape = len(units), trial.beam_size or 1
    logp_d_given_e, logp_d = (np.reshape(rows[name].to_numpy(), shape) for name in ("logp_d_given_e", "logp_d"))
    texts = np.reshape(rows["text"].to_pylist(), shape).tolist()
    finished = np.reshape(rows["finished"].to_numpy(), shape)
    contrasts = _contrasts(storage, task, trial, model, layer)
    tokens = _rows(rows["tokens"].to_pylist(), shape[1])
    contrasted = _contrasted(captioner, trial, tokens, [contrasts.get(unit) for unit in units])
    return rescored(texts, finished, logp_d_given_e, logp_d, trial.lams, trial.mus, contrasted)


def _rows(values: list[Any], size: int) -> list[list[Any]]:
    """Cuts a list into rows of one size."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def _contrasts(storage: Storage, task: Task, trial: Trial, model: str, layer: str) -> dict[int, np.ndarray]:
    """Unit → features of its contrasts; nothing for a trial that needs none."""
    if not trial.mus:
        return {}
    keys = {"encoder": task.encoder, "model": model, "layer": layer}
    return unit_features(storage.read(CONTRAST_ENCODINGS, ["unit", "rank", "feature"], **keys))


def _contrasted(
    captioner: Captioner, trial: Trial, tokens: Sequence[list[list[int]]], contrasts: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Log p(d|C) of candidates, (N, beam), NaN for units without contrasts; None for a trial that needs none.

    Args:
        captioner: The captioner.
        trial: The trial.
        tokens: Token ids of each unit's candidates, [unit][beam].
        contrasts: Features of each unit's contrasts (n, F), or None.
    """
    if not trial.mus:
        return None
    values = np.full((len(tokens), trial.beam_size or 1), np.nan, np.float32)
    for row, (own, features) in enumerate(zip(tokens, contrasts, strict=True)):
        if features is not None:
            values[row] = logp_given(captioner, own, features)
    return values


def _decoded(
    captioner: Captioner, trial: Trial, features: Sequence[np.ndarray], contrasts: Sequence[np.ndarray | None]
) -> list[list[str]]:
    """Decodes a layer's units; returns [setting][unit].

    Args:
        captioner: The captioner.
        trial: How to decode.
        features: Exemplar features (k, F) of each unit; units are batched by k, because dead units have fewer.
        contrasts: Features of each unit's contrasts, or None.
    """
    descriptions = [[""] * len(features) for _ in trial.lams]
    by_exemplars: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(features):
        by_exemplars[len(unit)].append(index)
    for indices in by_exemplars.values():
        for start in range(0, len(indices), UNITS_PER_SEARCH):
            batch = indices[start : start + UNITS_PER_SEARCH]
            exemplars, others = np.stack([features[index] for index in batch]), [contrasts[index] for index in batch]
            decoded = _decoded_batch(captioner, trial, exemplars, others)
            for texts, more in zip(descriptions, decoded, strict=True):
                for index, text in zip(batch, more, strict=True):
                    texts[index] = text
    return descriptions


def _decoded_batch(
    captioner: Captioner, trial: Trial, features: np.ndarray, contrasts: Sequence[np.ndarray | None]
) -> list[list[str]]:
    """Decodes units with features (B, k, F) and those of contrasts; returns [setting][unit]."""
    lam = trial.lams[0]
    if trial.strategy in (GREEDY, GREEDY_MI):
        mi = trial.strategy == GREEDY_MI
        texts = captioner.decode(features, "greedy", mi=mi, lam=lam, length=trial.length).texts
        return [[readable(text) for text in texts]]
    mi_lam = lam if trial.strategy == BEAM_MI else None
    candidates = captioner.candidates(features, trial.beam_size, trial.length, mi_lam)
    prior = None if trial.strategy == BEAM_MI else candidates.logp_d
    contrasted = _contrasted(captioner, trial, candidates.tokens, contrasts)
    likely = candidates.logp_d_given_e
    return rescored(candidates.texts, candidates.finished, likely, prior, trial.lams, trial.mus, contrasted)
