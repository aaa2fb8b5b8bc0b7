"""Descriptions (paper §3): a beam of candidates for every unit, then log p(d|E) − λ·log p(d).

encodings ─► [actor pool: beam search] ─► candidates ─► [rescore] ─► descriptions
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest as captioner_digest
from milan_ray.captioner.checkpoints import lm_digest
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.config import Fingerprint, Resources
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.stage import (
    Job,
    Known,
    Layers,
    Output,
    Shard,
    ShardedStage,
    Shards,
    ShardWorker,
    TaskStage,
    pairs,
    piece_schema,
    run_stages,
)
from milan_ray.engine.tasks import FEW_ROWS
from milan_ray.labelers.milan import LIKELIHOOD, MILAN, PointwiseMutualInformation
from milan_ray.labelers.protocol import Evidence, Label, Labeler
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS
from milan_ray.stages.captioners import captioner_name, load_captioner
from milan_ray.stages.encodings import only_units, unit_features
from milan_ray.storage import EXEMPLARS_KEY, Storage

Value = TypeVar("Value")

KERNEL_VERSION = "candidates-2"

_CANDIDATES_SCHEMA = piece_schema(CANDIDATES, "lm", "beam_size")

UNITS_PER_SEARCH = 32
"""Units per beam search."""

WIDE_BEAMS = 4000
"""Beams of all units of a search by mutual information, whose beams are wide: bounds its memory."""

REFERENCE_UNITS = 16
"""Units per beam search of the reference, whose scores depend on it."""


@dataclass(frozen=True)
class Search:
    """How descriptions are searched.

    Attributes:
        decoder: Captioner: a name in the run directory, a folder, or a published ``.pth`` file.
        beam_size: Width of the beam; None takes the captioner's own.
        length: Most tokens, ``<stop>`` included; None takes the captioner's own.
        lam: λ; None takes the captioner's own.
        quirks: Defects of the reference to reproduce in log p(d), and in the choice among candidates.
        mi_lam: Search for log p(d|E) − λ·log p(d) with this λ, token by token; None searches for log p(d|E).
        table: Name of the partition of candidates; None takes the captioner's.
    """

    decoder: str
    beam_size: int | None = None
    length: int | None = None
    lam: float | None = None
    quirks: Quirks = NO_QUIRKS
    mi_lam: float | None = None
    table: str | None = None

    @property
    def name(self) -> str:
        """The partition of candidates."""
        return captioner_name(self.decoder) if self.table is None else self.table


def units_per_search(quirks: Quirks) -> int:
    """Units per beam search: the reference's number where scores depend on it, else the planned batch."""
    return REFERENCE_UNITS if quirks.batch_dependent_length else UNITS_PER_SEARCH


def search_identity(captioner: Captioner, search: Search) -> dict[str, object]:
    """All inputs that decide candidates, except the encodings."""
    identity: dict[str, object] = {
        "kernel": KERNEL_VERSION,
        "captioner": captioner_digest(captioner),
        "beam_size": _given(search.beam_size, captioner.beam_size),
        "length": _given(search.length, captioner.length),
        "quirks": search.quirks.of_search(),
    }
    return identity if search.mi_lam is None else identity | {"mi_lam": search.mi_lam}


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def candidates_fingerprint(search: Mapping[str, object], encodings: str, units: tuple[int, ...]) -> Fingerprint:
    """The fingerprint of a layer's candidates.

    Args:
        search: As :func:`search_identity` gives it.
        encodings: Configuration hash of the layer's encodings, all units of them.
        units: The units selected; empty for all.
    """
    return Fingerprint.of({**search, "encodings": encodings}, units)


def labelers(captioner: Captioner, search: Search) -> list[PointwiseMutualInformation]:
    """The labelers that rank the candidates of a captioner's own search."""
    plain = search.quirks.plain_choice
    likelihood = PointwiseMutualInformation(LIKELIHOOD, 0.0, plain)
    if captioner.lm is None:
        return [likelihood]
    return [likelihood, PointwiseMutualInformation(MILAN, _given(search.lam, captioner.lam), plain)]


def description_fingerprint(
    labeler: Labeler, candidates: str, units: tuple[int, ...], encodings: str | None = None
) -> Fingerprint:
    """The fingerprint of a layer's descriptions by one labeler.

    Args:
        labeler: The labeler.
        candidates: Configuration hash of the layer's candidates, all units of them.
        units: The units selected; empty for all.
        encodings: The same of its encodings, where the labeler compares with them.
    """
    inputs = labeler.identity() | {"candidates": candidates}
    return Fingerprint.of(inputs if encodings is None else inputs | {"encodings": encodings}, units)


class CandidateWorker(ShardWorker):
    """Searches candidates for a batch of units."""

    def __init__(self, encoded: dict[int, dict[str, str]], search: Search, **context: Any) -> None:
        super().__init__(**context)
        self._encoded, self._search = encoded, search
        self._captioner = load_captioner(self._storage, search.decoder).to(str(self._device))
        self._features: tuple[int, dict[int, np.ndarray]] = (-1, {})

    def __call__(self, row: Row) -> Row:
        """Runs one batch of units."""
        (number,) = row["outputs"]
        features = self._of(number)
        by_count: dict[int, list[int]] = defaultdict(list)
        for unit in row["units"]:
            by_count[len(features[unit])].append(unit)  # dead or broken units may have fewer exemplars
        tables = [self._candidates([(unit, features[unit]) for unit in units]) for units in by_count.values()]
        found = pa.concat_tables(tables).sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
        self._store(row, [(number, found)])
        return {}

    def _of(self, number: int) -> dict[int, np.ndarray]:
        if self._features[0] != number:
            table = self._storage.read(ENCODINGS, ["unit", "rank", "feature"], **self._encoded[number])
            self._features = (number, unit_features(table))
        return self._features[1]

    def _candidates(self, units: list[tuple[int, np.ndarray]]) -> pa.Table:
        candidates = self._captioner.candidates(
            np.stack([features for _, features in units]),
            self._search.beam_size,
            self._search.length,
            self._search.mi_lam,
            self._search.quirks,
        )
        beams = candidates.logp_d_given_e.shape[1]
        logp_d = candidates.logp_d if candidates.logp_d is not None else np.zeros_like(candidates.logp_d_given_e)
        return pa.table(
            {
                "unit": pa.array(np.repeat([unit for unit, _ in units], beams), pa.int32()),
                "beam_rank": pa.array(np.tile(np.arange(beams), len(units)), pa.int32()),
                "tokens": pa.array([tokens for unit in candidates.tokens for tokens in unit], pa.list_(pa.int32())),
                "finished": candidates.finished.ravel(),
                "logp_d_given_e": candidates.likelihood(self._search.mi_lam).ravel(),
                "logp_d": logp_d.ravel(),
                "text": [text for unit in candidates.texts for text in unit],
            },
            schema=_CANDIDATES_SCHEMA,
        )


class Candidates(ShardedStage):
    """Candidate descriptions of every unit of some layers, by a captioner's beam search.

    Args:
        models: Model name → layers.
        search: Captioner, beam.
        captioner: The search's captioner.
        units: The units of every layer to describe; empty for all.
    """

    worker = CandidateWorker
    table, counted = CANDIDATES, "units"
    name, label = "candidates", "descriptions"

    def __init__(self, models: Layers, search: Search, captioner: Captioner, units: tuple[int, ...] = ()) -> None:
        self._models, self._units = models, units
        self._search, self._identity = search, search_identity(captioner, search)
        self._beam_size = _given(search.beam_size, captioner.beam_size)
        self._encoder, self._lm = captioner.encoder_name, lm_digest(captioner) or ""
        self.title = f"candidates ({search.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Candidates of every layer, by what its encodings are."""
        for model, layer in pairs(self._models):
            encodings = known.all_units(ENCODINGS, encoder=self._encoder, model=model, layer=layer)
            keys = {"decoder": self._search.name, "model": model, "layer": layer}
            yield Output(keys, candidates_fingerprint(self._identity, encodings, self._units))

    def shards(self, job: Job) -> Shards:
        """Batches of units."""
        wide = self._search.mi_lam is not None
        size = max(1, WIDE_BEAMS // self._beam_size) if wide else units_per_search(self._search.quirks)
        shards = []
        for output in job.due:
            encoded = job.storage.read(ENCODINGS, ["unit"], **self._encoded(output))
            present = sorted(set(only_units(encoded, output.fingerprint.units)["unit"].to_pylist()))
            for start in range(0, len(present), size):
                batch = present[start : start + size]
                name = f"{output.number:04d}-{batch[0]:06d}"
                shards.append(Shard(name, (output.number,), {"units": batch}, len(batch)))
        return Shards(shards, sum(shard.size for shard in shards) * self._beam_size <= FEW_ROWS)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The search, and the partition of each output's encodings."""
        return {"encoded": {output.number: self._encoded(output) for output in job.due}, "search": self._search}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's candidates, by unit and place in the beam."""
        table = pa.concat_tables([_CANDIDATES_SCHEMA.empty_table(), *pieces])
        table = table.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
        searched = {"lm": [self._lm] * len(table), "beam_size": [self._beam_size] * len(table)}
        exemplars = storage.exemplars_of(ENCODINGS, **self._encoded(output)) or ""
        return CANDIDATES.table({**output.columns(table), **searched}, {EXEMPLARS_KEY: exemplars})

    def _encoded(self, output: Output) -> dict[str, str]:
        return {"encoder": self._encoder, "model": output.model, "layer": output.layer}


class Descriptions(TaskStage):
    """The best of the candidates of some layers, by the captioner's own labelers.

    Args:
        models: Model name → layers.
        search: Captioner, beam, λ.
        captioner: The search's captioner.
        units: The units of every layer to describe; empty for all.
    """

    table, name = DESCRIPTIONS, "descriptions"

    def __init__(self, models: Layers, search: Search, captioner: Captioner, units: tuple[int, ...] = ()) -> None:
        self._models, self._units, self._decoder = models, units, search.name
        self._labelers = {labeler.name: labeler for labeler in labelers(captioner, search)}
        self.title = f"descriptions ({search.name})"
        if captioner.lm is None:
            self.remark = f"captioner {search.name} has no language model: described by log p(d|E) alone ({LIKELIHOOD})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Descriptions of every layer by every labeler, by what its candidates are."""
        for labeler in self._labelers.values():
            for model, layer in pairs(self._models):
                candidates = known.all_units(CANDIDATES, decoder=self._decoder, model=model, layer=layer)
                keys = {"labeler": labeler.name, "model": model, "layer": layer}
                yield Output(keys, description_fingerprint(labeler, candidates, self._units))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """A layer's descriptions by one labeler."""
        labeler = self._labelers[output.keys["labeler"]]
        labels = labeler.label(Evidence(read_candidates(storage, self._decoder, output)))
        exemplars = storage.exemplars_of(CANDIDATES, **candidates_of(self._decoder, output)) or ""
        return described(output, labeler, labels, exemplars, self._decoder)

    def runs_in_driver(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """Whether there are few candidates."""
        layers = {(output.model, output.layer): output for output in outputs}.values()
        return sum(storage.count(CANDIDATES, **candidates_of(self._decoder, output)) for output in layers) <= FEW_ROWS


def description_stages(
    models: Layers, search: Search, captioner: Captioner, units: tuple[int, ...] = ()
) -> tuple[Candidates, Descriptions]:
    """The stages that describe encoded layers; arguments as of these."""
    return Candidates(models, search, captioner, units), Descriptions(models, search, captioner, units)


def run_descriptions(
    storage: Storage,
    models: Layers,
    search: Search,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> None:
    """Describes every unit of every layer whose descriptions are missing or stale, by both MILAN labelers.

    Args:
        storage: The run directory, which holds encodings.
        models: Model name → layers.
        search: Captioner, beam, λ.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to describe; empty for all.

    Raises:
        MilanError: The captioner or encodings are missing.
    """
    run_stages(description_stages(models, search, load_captioner(storage, search.decoder), units), storage, resources)


def candidates_of(decoder: str, output: Output) -> dict[str, str]:
    """The partition of the candidates that an output is chosen from."""
    return {"decoder": decoder, "model": output.model, "layer": output.layer}


def read_candidates(storage: Storage, decoder: str, output: Output, columns: Sequence[str] | None = None) -> pa.Table:
    """The candidates that an output is chosen from, of the units selected, by unit and beam rank."""
    table = storage.read(CANDIDATES, columns, **candidates_of(decoder, output))
    return only_units(table, output.fingerprint.units).combine_chunks()


def described(
    output: Output,
    labeler: Labeler,
    labels: Mapping[int, Sequence[Label]],
    exemplars: str,
    decoder: str = "",
    further: Mapping[str, str] | None = None,
) -> pa.Table:
    """A layer's descriptions as a table.

    Args:
        output: Its partition.
        labeler: Whose labels they are.
        labels: Unit → its labels, best first.
        exemplars: Configuration hash of the exemplars that they describe.
        decoder: Captioner whose candidates the labels were chosen from; empty for none.
        further: Further metadata of the file.
    """
    rows = [
        {
            **output.keys,
            "unit": unit,
            "description": best[0].text,
            "score": best[0].score,
            "logp_d_given_e": best[0].logp_d_given_e,
            "logp_d": best[0].logp_d,
            "lam": labeler.lam,
            "n_best": [asdict(label) for label in best],
        }
        for unit, best in labels.items()
    ]
    metadata = {"decoder": decoder, EXEMPLARS_KEY: exemplars, **(further or {})}
    if labeler.lam is not None:
        metadata["lam"] = str(labeler.lam)
    return pa.Table.from_pylist(rows, schema=DESCRIPTIONS.schema.with_metadata(metadata))
