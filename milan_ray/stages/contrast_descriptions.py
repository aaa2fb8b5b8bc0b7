"""Contrastive descriptions (docs/contrast.md), as labeler ``milan-contrast``.

candidates, contrast_encodings ─► [actor pool: log p(d|C) of a batch of units] ─► [rank] ─► descriptions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.contrast import logp_given
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.stage import Job, Known, Layers, Output, Shard, ShardedStage, Shards, ShardWorker, pairs
from milan_ray.engine.tasks import FEW_ROWS
from milan_ray.labelers.milan import ContrastiveInformation, by_unit
from milan_ray.labelers.protocol import Evidence
from milan_ray.schema import CANDIDATES, CONTRAST_ENCODINGS, DESCRIPTIONS
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.stages.contrasts import ContrastEncodings, Contrasts, ContrastSource, contrasts_metadata
from milan_ray.stages.descriptions import (
    Search,
    candidates_of,
    described,
    description_fingerprint,
    read_candidates,
)
from milan_ray.stages.encodings import only_units, unit_features
from milan_ray.storage import Storage

UNITS_PER_SHARD = 32
"""Units per shard."""

_COMPARED_SCHEMA = pa.schema([("unit", pa.int32()), ("beam_rank", pa.int32()), ("contrasted", pa.float32())])


def contrastive(captioner: Captioner, search: Search, mu: float) -> ContrastiveInformation:
    """The labeler of a search with this μ; without a language model λ is 0.

    Raises:
        MilanError: μ is negative, or λ + μ above 1.
    """
    lam = captioner.lam if search.lam is None else search.lam
    return ContrastiveInformation(0.0 if captioner.lm is None else lam, mu, search.quirks.plain_choice)


class ContrastWorker(ShardWorker):
    """Computes log p(d|C) of the candidates of a batch of units."""

    def __init__(self, search: Search, **context: Any) -> None:
        super().__init__(**context)
        self._search = search
        self._captioner = load_captioner(self._storage, search.decoder).to(str(self._device))
        self._read: tuple[int, pa.Table, dict[int, np.ndarray]] = (-1, pa.table({}), {})

    def __call__(self, row: Row) -> Row:
        """Runs one batch."""
        (number,) = row["outputs"]
        candidates, features = self._of(number)
        table = only_units(candidates, tuple(row["units"])).combine_chunks()
        tokens = table["tokens"].to_pylist()
        values = np.full(len(table), np.nan, np.float32)
        for unit, rows in by_unit(table["unit"].to_numpy()):
            if unit in features:
                values[rows] = logp_given(self._captioner, tokens[rows], features[unit])
        columns = [table["unit"], table["beam_rank"], pa.array(values)]
        self._store(row, [(number, pa.table(columns, schema=_COMPARED_SCHEMA))])
        return {}

    def _of(self, number: int) -> tuple[pa.Table, dict[int, np.ndarray]]:
        """An output's candidates, and features of its units' contrasts."""
        if self._read[0] != number:
            output = self._outputs[number]
            columns = ["unit", "beam_rank", "tokens"]
            candidates = read_candidates(self._storage, self._search.name, output, columns)
            keys = {"encoder": self._captioner.encoder_name, **output.of_layer}
            encoded = self._storage.read(CONTRAST_ENCODINGS, ["unit", "rank", "feature"], **keys)
            self._read = number, candidates, unit_features(encoded)
        return self._read[1], self._read[2]


class ContrastDescriptions(ShardedStage):
    """The best of the candidates of some layers, by log p(d|E) − λ·log p(d) − μ·log p(d|C).

    Args:
        models: Model name → layers.
        search: Captioner, beam, λ.
        captioner: The search's captioner.
        source: What the contrasts C were chosen from.
        mu: μ.
        units: The units of every layer to describe; empty for all.
    """

    worker = ContrastWorker
    table, counted = DESCRIPTIONS, "units"

    def __init__(
        self,
        models: Layers,
        search: Search,
        captioner: Captioner,
        source: ContrastSource,
        mu: float,
        units: tuple[int, ...] = (),
    ) -> None:
        self._models, self._search, self._source, self._units = models, search, source, units
        self._labeler = contrastive(captioner, search, mu)
        self._encoder = captioner.encoder_name
        self.name = self._labeler.name
        self.title = self.label = f"descriptions ({self.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Descriptions of every layer, by what its candidates and the encodings of its contrasts are."""
        for model, layer in pairs(self._models):
            keys = {"model": model, "layer": layer}
            candidates = known.all_units(CANDIDATES, decoder=self._search.name, **keys)
            contrasts = known.all_units(CONTRAST_ENCODINGS, encoder=self._encoder, **keys)
            fingerprint = description_fingerprint(self._labeler, candidates, self._units, contrasts)
            yield Output({"labeler": self.name, **keys}, fingerprint)

    def shards(self, job: Job) -> Shards:
        """Batches of units."""
        shards, rows = [], 0
        for output in job.due:
            units = read_candidates(job.storage, self._search.name, output, ["unit"])["unit"]
            rows += len(units)
            present = sorted(set(units.to_pylist()))
            for start in range(0, len(present), UNITS_PER_SHARD):
                batch = present[start : start + UNITS_PER_SHARD]
                name = f"{output.number:04d}-{batch[0]:06d}"
                shards.append(Shard(name, (output.number,), {"units": batch}, len(batch)))
        return Shards(shards, rows <= FEW_ROWS)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The captioner."""
        return {"search": self._search}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's candidates, ranked."""
        table = read_candidates(storage, self._search.name, output)
        compared = pa.concat_tables([_COMPARED_SCHEMA.empty_table(), *pieces])
        compared = compared.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])  # the candidates' order
        labels = self._labeler.label(Evidence(table, contrasted=compared["contrasted"].to_numpy()))
        exemplars = storage.exemplars_of(CANDIDATES, **candidates_of(self._search.name, output)) or ""
        keys = self._source.keys(output.model, output.layer)
        further = {"mu": str(self._labeler.mu), **contrasts_metadata(storage, keys)}
        return described(output, self._labeler, labels, exemplars, self._search.name, further)


def contrast_stages(
    models: Layers,
    search: Search,
    captioner: Captioner,
    encoder: EncoderRef,
    source: ContrastSource,
    mu: float,
    units: tuple[int, ...] = (),
) -> tuple[Contrasts, ContrastEncodings, ContrastDescriptions]:
    """The stages that describe layers with contrasts, after their candidates and the probe's embeddings are there.

    Arguments as of :class:`ContrastDescriptions`, and the captioner's encoder.
    """
    return (
        Contrasts(models, source, units),
        ContrastEncodings(models, encoder, source, units),
        ContrastDescriptions(models, search, captioner, source, mu, units),
    )
