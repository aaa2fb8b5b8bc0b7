"""Re-ranking by a model of images and texts (docs/clip.md), as labeler ``milan+clip``.

encodings ─► [actor pool: wide beam search] ─► candidates ─┐
exemplars ─► [actor pool: embed images and regions] ─► encodings ─► [scatter by text] ─► [actor pool: embed texts,
compare] ─► [gather] ─► descriptions
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.quirks import NO_QUIRKS
from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import FEW_ROWS, beside_others, removed_if_damaged, run_parallel
from milan_ray.labelers.clip import Clip, ClipSimilarity, query, similarity
from milan_ray.labelers.protocol import Evidence
from milan_ray.progress import Progress, say
from milan_ray.schema import CANDIDATES, ENCODINGS
from milan_ray.stages.captioners import RERANKED, load_captioner
from milan_ray.stages.descriptions import (
    Layer,
    Search,
    described,
    description_recipe,
    read_candidates,
    run_candidates,
    write_labels,
)
from milan_ray.stages.encodings import only_units, run_encodings, unit_features
from milan_ray.storage import Storage

PAIRS = 8192
"""Candidates per chunk of texts, about: the unit of work."""


def wide_search(captioner: Captioner, search: Search, clip: Clip) -> Search:
    """The search for what is to be re-ranked: wide, and by mutual information where there is a language model.

    Args:
        captioner: The search's captioner.
        search: The captioner's own search.
        clip: How to re-rank.
    """
    return replace(
        search,
        beam_size=clip.beams(captioner),
        lam=None,
        quirks=NO_QUIRKS,  # none of them touches this search
        mi_lam=clip.mi_lam(captioner),
        table=search.name + RERANKED,
    )


@dataclass(frozen=True)
class _Compare:
    storage: Storage
    work: str
    decoder: str
    encoder: str
    layer: Layer
    labeler: ClipSimilarity
    recipe: Recipe
    chunks: int
    cost: Cost
    parts: tuple[str, ...] = ()

    def part(self, chunk: str) -> str:
        """Work of this layer in a chunk of texts."""
        return f"scores/{self.layer.number}/{chunk}"


@beside_others
def run_reranking(
    storage: Storage,
    models: Mapping[str, Sequence[str]],
    search: Search,
    clip: Clip,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> None:
    """Describes every unit of every layer whose re-ranked descriptions are missing or stale.

    Every image and every region of it is embedded once, every distinct text once, for all units, layers and models.

    Args:
        storage: The run directory, which holds exemplars and the captioner's encodings.
        models: Model name → layers.
        search: The captioner and its own search.
        clip: How to re-rank.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to describe; empty for all.

    Raises:
        MilanError: The captioner, encodings or the model of images and texts are missing.
    """
    labeler = clip.labeler()
    captioner = load_captioner(storage, search.decoder)
    wide = wide_search(captioner, search, clip)
    layers = run_candidates(storage, models, wide, captioner, resources, units)
    run_encodings(storage, models, clip, resources, units)
    recipes = {
        layer.number: description_recipe(
            layer.recipe,
            labeler,
            storage.whole_of(ENCODINGS, encoder=clip.name, model=layer.model, layer=layer.layer),
        )
        for layer in layers
    }
    work = config_hash({labeler.name: [recipe.hash for recipe in recipes.values()]})
    total = sum(storage.count(CANDIDATES, decoder=wide.name, model=one.model, layer=one.layer) for one in layers)
    chunks = max(1, total // PAIRS)
    tasks = [
        _Compare(storage, work, wide.name, clip.name, layer, labeler, recipes[layer.number], chunks, Cost())
        for layer in layers
        if not described(storage, layer, labeler, recipes[layer.number])
    ]
    if not tasks:
        storage.remove_work(work)
        say(f"descriptions ({labeler.name}): all up to date")
        return
    with removed_if_damaged(storage, work):
        names: dict[int, list[str]] = {}
        for index, found in run_parallel(_scatter, tasks, here=total <= FEW_ROWS):
            names[index] = found
        stored = set(storage.work_names(work, "scores"))
        row_of: dict[str, Row] = defaultdict(lambda: {"layers": []})
        for index, task in enumerate(tasks):
            for chunk in names[index]:
                if task.part(chunk) not in stored:
                    row_of[chunk]["layers"].append(task.layer.number)
        rows = [{"chunk": chunk, **row_of[chunk]} for chunk in sorted(row_of)]
        say(f"descriptions ({labeler.name}): {len(tasks)} layers by {clip.name}")
        arguments = {
            "storage": storage,
            "work": work,
            "clip": clip,
            "threads": resources.threads,
            "device": resources.device,
        }
        named = {task.layer.number: task.layer.name for task in tasks}
        costs = {task.layer.number: task.cost for task in tasks}
        pieces = (named[number] for row in rows for number in row["layers"])
        with Progress(f"descriptions ({labeler.name})", len(rows), "chunks of texts", pieces) as progress:
            for answer in run_pool(SimilarityWorker, arguments, rows, resources):
                progress.advance(1, (named[number] for number in answer["layers"]))
                for number in answer["layers"]:
                    costs[number].add(answer["seconds"], len(answer["layers"]))
        gathers = [replace(task, parts=tuple(names[index])) for index, task in enumerate(tasks)]
        for _ in run_parallel(_gather, gathers, here=total <= FEW_ROWS):
            pass
    storage.remove_work(work)


def _scatter(task: _Compare) -> list[str]:
    """Sorts a layer's candidates by text into chunks, beside its units' queries; returns the chunks' names.

    Which chunk a text falls into depends on the text alone, so that no two chunks, of whatever layers, share one.
    """
    layer = task.layer
    keys = {"encoder": task.encoder, "model": layer.model, "layer": layer.layer}
    encoded = task.storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys)
    features = unit_features(only_units(encoded, layer.recipe.units))
    queries = {unit: query(found, task.labeler.z) for unit, found in features.items()}
    units, vectors = list(queries), list(queries.values())
    lists = pa.array(vectors, pa.list_(pa.float32()))
    task.storage.put_work(
        task.work, f"queries/{layer.number}", pa.table({"unit": pa.array(units, pa.int32()), "query": lists})
    )
    table = read_candidates(task.storage, task.decoder, layer, ["unit", "beam_rank", "text"])
    texts = table["text"].combine_chunks().dictionary_encode()
    of_text = np.array([zlib.crc32(text.encode()) % task.chunks for text in texts.dictionary.to_pylist()], np.int64)
    of_row = of_text[texts.indices.to_numpy()] if len(table) else of_text
    names = []
    for chunk in np.unique(of_row).tolist():
        names.append(f"{chunk:06d}")
        mine = table.filter(pa.array(of_row == chunk))
        task.storage.put_work(task.work, f"pairs/{names[-1]}/{layer.number}", mine)
    return names


class SimilarityWorker:
    """Embeds a chunk's texts once and compares them with every unit that has one of them as a candidate."""

    def __init__(self, storage: Storage, work: str, clip: Clip, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work = storage, work
        self._model = clip.load().to(resolve_device(device))

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        pairs = {
            number: self._storage.get_work(self._work, f"pairs/{row['chunk']}/{number}") for number in row["layers"]
        }
        texts = sorted({text for table in pairs.values() for text in table["text"].to_pylist()})
        embedded = self._model.embed_texts(texts).cpu().numpy()
        known = pa.array(texts, pa.string())
        for number, table in pairs.items():
            queries = self._storage.get_work(self._work, f"queries/{number}").combine_chunks()
            vectors = queries["query"].combine_chunks().flatten().to_numpy().reshape(len(queries), -1)
            unit = pc.index_in(table["unit"], queries["unit"].combine_chunks()).to_numpy()
            text = pc.index_in(table["text"], known).to_numpy()
            scores = pa.array(similarity(embedded[text], vectors[unit]), pa.float32())
            self._storage.put_work(
                self._work,
                f"scores/{number}/{row['chunk']}",
                table.select(["unit", "beam_rank"]).append_column("similarity", scores),
            )
        return {"layers": row["layers"], "texts": len(texts)}


def _gather(task: _Compare) -> None:
    """Ranks a layer's candidates and makes the best public."""
    table = read_candidates(task.storage, task.decoder, task.layer)
    scores = np.zeros(0, np.float32)
    if len(table):
        found = pa.concat_tables(task.storage.get_work(task.work, task.part(chunk)) for chunk in task.parts)
        found = found.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])  # the candidates' own order
        scores = found["similarity"].to_numpy()
    labels = task.labeler.label(Evidence(table, scores))
    run, model, layer = task.recipe.hash, task.layer.model, task.layer.layer
    record_run(task.storage, task.labeler.name, run, model, layer=layer, rows=len(labels), cost=task.cost)
    write_labels(task.storage, task.decoder, task.layer, task.labeler, task.recipe, labels)
