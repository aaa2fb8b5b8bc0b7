"""Re-ranking by a model of images and texts (docs/clip.md), as labeler ``milan+clip``.

encodings ─► [actor pool: wide beam search] ─► candidates ─┐
exemplars ─► [actor pool: embed images and regions] ─► encodings ─► [scatter by text] ─► [actor pool: embed texts,
compare] ─► [gather] ─► descriptions
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.quirks import Quirks
from milan_ray.captioner.text import readable
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.scattered import Scattered
from milan_ray.engine.stage import Job, Known, Layers, Output, Shard, ShardedStage, Shards, ShardWorker, pairs
from milan_ray.engine.tasks import FEW_ROWS, run_parallel
from milan_ray.labelers.clip import Clip, contrasted_query, similarity
from milan_ray.labelers.protocol import Evidence
from milan_ray.schema import CANDIDATES, CONTRAST_ENCODINGS, DESCRIPTIONS, ENCODINGS
from milan_ray.stages.captioners import RERANKED
from milan_ray.stages.contrasts import ContrastEncodings, ContrastSource, contrasts_metadata
from milan_ray.stages.descriptions import (
    Candidates,
    Search,
    candidates_of,
    described,
    description_fingerprint,
    read_candidates,
)
from milan_ray.stages.encodings import Encodings, only_units, unit_features
from milan_ray.storage import Storage

PAIRS = 8192
"""Approximate number of candidates per chunk of texts, which is a shard; four times as many in a large job."""

MOST_QUERIES = 256
"""Layers whose units' queries a worker keeps: most chunks have candidates of all layers."""

QUERIES = "queries"
"""Part of what is scattered of a layer: its units' queries."""


def chunks_of(pairs: int) -> int:
    """The number of chunks of a job's candidates: they grow, up to a bound, before there are more than 512 of them."""
    return max(1, pairs // min(4 * PAIRS, max(PAIRS, pairs // 512)))


def wide_search(captioner: Captioner, search: Search, clip: Clip) -> Search:
    """The search whose candidates are re-ranked: wide, and by mutual information where there is a language model.

    Args:
        captioner: The search's captioner.
        search: The captioner's own search.
        clip: How to re-rank.
    """
    return replace(
        search,
        beam_size=clip.beams(captioner),
        lam=None,
        quirks=Quirks(plain_choice=search.quirks.plain_choice),  # no other touches this search
        mi_lam=clip.mi_lam(captioner),
        table=search.name + RERANKED,
    )


class SimilarityWorker(ShardWorker):
    """Embeds a chunk's texts once and compares them with every unit that has one of them as a candidate."""

    def __init__(self, clip: Clip, plain_choice: bool, **context: Any) -> None:
        super().__init__(**context)
        self._model, self._write = clip.load().to(self._device), str if plain_choice else readable
        self._scattered = Scattered(self._storage, self._work)
        self._queries = lru_cache(MOST_QUERIES)(self._read_queries)

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        pairs = dict(self._scattered.get(row["outputs"], row["name"]))
        texts = sorted({text for table in pairs.values() for text in table["text"].to_pylist()})
        embedded = self._model.embed_texts([self._write(text) for text in texts]).cpu().numpy()
        known = pa.array(texts, pa.string())

        def compared() -> Iterator[tuple[int, pa.Table]]:
            for number, table in pairs.items():
                units, vectors = self._queries(number)
                unit = pc.index_in(table["unit"], units).to_numpy()
                text = pc.index_in(table["text"], known).to_numpy()
                scores = pa.array(similarity(embedded[text], vectors[unit]), pa.float32())
                yield number, table.select(["unit", "beam_rank"]).append_column("similarity", scores)

        self._store(row, compared())
        return {"texts": len(texts)}

    def _read_queries(self, number: int) -> tuple[pa.Array, np.ndarray]:
        """An output's units (U,) and their queries (U, D)."""
        ((_, queries),) = self._scattered.get([number], QUERIES)
        vectors = queries["query"].combine_chunks().flatten().to_numpy()
        return queries["unit"].combine_chunks(), vectors.reshape(len(queries), -1)


class Reranked(ShardedStage):
    """The best of a wide search's candidates, by a model of images and texts: every distinct text is embedded once.

    Args:
        models: Model name → layers.
        search: The wide search.
        clip: How to re-rank.
        units: The units of every layer to describe; empty for all.
        contrasts: Name of the model by which contrasts were chosen, where exemplars are set against them.
    """

    worker = SimilarityWorker
    table, counted = DESCRIPTIONS, "chunks of texts"

    def __init__(
        self, models: Layers, search: Search, clip: Clip, units: tuple[int, ...] = (), contrasts: str | None = None
    ) -> None:
        self._models, self._decoder, self._clip, self._units = models, search.name, clip, units
        self._contrasts = contrasts
        self._labeler = clip.labeler(search.quirks.plain_choice)
        self.name = self._labeler.name
        self.title = f"descriptions ({self.name})"
        self.label = self.title

    def outputs(self, known: Known) -> Iterator[Output]:
        """Descriptions of every layer, by what its candidates and the model's encodings are."""
        for model, layer in pairs(self._models):
            keys = {"model": model, "layer": layer}
            candidates = known.all_units(CANDIDATES, decoder=self._decoder, **keys)
            encodings = known.all_units(ENCODINGS, encoder=self._clip.name, **keys)
            if self._contrasts is not None:
                encodings += f" {known.all_units(CONTRAST_ENCODINGS, encoder=self._clip.name, **keys)}"
            fingerprint = description_fingerprint(self._labeler, candidates, self._units, encodings)
            yield Output({"labeler": self.name, **keys}, fingerprint)

    def shards(self, job: Job) -> Shards:
        """Chunks of texts; a text's chunk depends on the text alone, so that each text is in one chunk only."""
        pairs = sum(job.storage.count(CANDIDATES, **candidates_of(self._decoder, output)) for output in job.every)
        few = pairs <= FEW_ROWS
        scatter = partial(self._scatter, job.storage, job.work, chunks_of(pairs))
        outputs: dict[str, list[int]] = defaultdict(list)
        for index, names in run_parallel(scatter, job.due, in_driver=few):
            for name in names:
                outputs[name].append(job.due[index].number)
        return Shards([Shard(name, tuple(sorted(outputs[name]))) for name in sorted(outputs)], few)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The model of images and texts."""
        return {"clip": self._clip, "plain_choice": self._labeler.plain_choice}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's candidates, ranked."""
        table = read_candidates(storage, self._decoder, output)
        scores = np.zeros(0, np.float32)
        if len(table):
            compared = pa.concat_tables(pieces)
            compared = compared.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])  # the candidates' order
            scores = compared["similarity"].to_numpy()
        labels = self._labeler.label(Evidence(table, scores))
        exemplars = storage.exemplars_of(CANDIDATES, **candidates_of(self._decoder, output)) or ""
        if self._contrasts is None:
            return described(output, self._labeler, labels, exemplars, self._decoder)
        keys = {"encoder": self._contrasts, **output.of_layer}
        further = {"gamma": str(self._clip.gamma), **contrasts_metadata(storage, keys)}
        return described(output, self._labeler, labels, exemplars, self._decoder, further)

    def _scatter(self, storage: Storage, work: str, chunks: int, output: Output) -> list[str]:
        """Sorts a layer's candidates by text into chunks, and stores its units' queries; returns the chunks' names."""
        keys = {"encoder": self._clip.name, "model": output.model, "layer": output.layer}
        encoded = storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys)
        features = unit_features(only_units(encoded, output.fingerprint.units))
        others: dict[int, np.ndarray] = {}
        if self._contrasts is not None:
            others = unit_features(storage.read(CONTRAST_ENCODINGS, ["unit", "rank", "feature"], **keys))
        queries_of = [
            contrasted_query(of_unit, others.get(unit), self._labeler.z, self._clip.gamma)
            for unit, of_unit in features.items()
        ]
        units = pa.array(list(features), pa.int32())
        vectors = pa.array(queries_of, pa.list_(pa.float32()))
        queries = pa.table({"unit": units, "query": vectors})
        table = read_candidates(storage, self._decoder, output, ["unit", "beam_rank", "text"])
        texts = table["text"].combine_chunks().dictionary_encode()
        of_text = np.array([zlib.crc32(text.encode()) % chunks for text in texts.dictionary.to_pylist()], np.int64)
        of_row = of_text[texts.indices.to_numpy()] if len(table) else of_text
        chunks_of_layer = np.unique(of_row).tolist()
        parts = [(f"{chunk:06d}", table.filter(pa.array(of_row == chunk))) for chunk in chunks_of_layer]
        Scattered(storage, work).put(output.number, [*parts, (QUERIES, queries)])
        return [name for name, _ in parts]


def reranking_stages(
    models: Layers, search: Search, captioner: Captioner, clip: Clip, units: tuple[int, ...] = ()
) -> tuple[Candidates, Encodings, Reranked]:
    """The stages that describe encoded layers by re-ranking a wide search.

    Every image and every region of it is embedded once, every distinct text once, for all units, layers and models.

    Args:
        models: Model name → layers.
        search: The captioner's own search.
        captioner: The search's captioner.
        clip: How to re-rank.
        units: The units of every layer to describe; empty for all.
    """
    wide = wide_search(captioner, search, clip)
    return (
        Candidates(models, wide, captioner, units),
        Encodings(models, clip, units),
        Reranked(models, wide, replace(clip, gamma=0.0), units),
    )


def contrast_reranking_stages(
    models: Layers,
    search: Search,
    captioner: Captioner,
    clip: Clip | None,
    source: ContrastSource,
    units: tuple[int, ...] = (),
) -> list[ShardedStage]:
    """The stages that re-rank the same candidates with contrasts, after those of :func:`reranking_stages`.

    Args:
        models: Model name → layers.
        search: The captioner's own search.
        captioner: The search's captioner.
        clip: How to re-rank; None, or γ = 0, for not at all.
        source: What the contrasts were chosen from.
        units: The units of every layer to describe; empty for all.
    """
    if clip is None or not clip.gamma:
        return []
    wide = wide_search(captioner, search, clip)
    return [
        ContrastEncodings(models, clip, source, units),
        Reranked(models, wide, clip, units, source.images.ref.name),
    ]
