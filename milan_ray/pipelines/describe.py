"""Descriptions (paper §3; DESIGN §5): a beam of candidates for every unit, then log p(d|E) − λ·log p(d).

encodings ─► [actor pool: beam search] ─► candidates ─► [rescore] ─► descriptions
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest as captioner_digest
from milan_ray.captioner.checkpoints import lm_digest
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.captioner.rerank import rescore
from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.pipelines.captioners import captioner_name, load_captioner
from milan_ray.pipelines.encodings import only_units, unit_features
from milan_ray.pipelines.fanout import run_parallel
from milan_ray.pipelines.pool import Row, run_pool
from milan_ray.pipelines.records import record_run
from milan_ray.progress import Progress, say
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS
from milan_ray.storage import EXEMPLARS_KEY, Storage

KERNEL_VERSION = "candidates-1"

_CANDIDATES_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("beam_rank", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("logp_d_given_e", pa.float32()),
        ("logp_d", pa.float32()),
        ("text", pa.string()),
    ]
)

UNITS = 32
"""Units per beam search."""

REFERENCE_UNITS = 16
"""Units per beam search of the reference, whose scores depend on it (REFERENCE §5)."""

N_BEST = 5

MILAN = "milan"
"""Labeler: log p(d|E) − λ·log p(d)."""

LIKELIHOOD = "milan-pdE"
"""Labeler: log p(d|E) alone."""


@dataclass(frozen=True)
class Search:
    """How descriptions are searched.

    Attributes:
        decoder: Captioner: a name in the run directory, a folder, or a published ``.pth`` file.
        beam_size: Width of the beam; None takes the captioner's own.
        length: Most tokens, ``<stop>`` included; None takes the captioner's own.
        lam: λ; None takes the captioner's own.
        quirks: Defects of the reference to reproduce in log p(d).
    """

    decoder: str
    beam_size: int | None = None
    length: int | None = None
    lam: float | None = None
    quirks: Quirks = NO_QUIRKS


@dataclass(frozen=True)
class _Settled:
    """A search with nothing left open."""

    decoder: str
    beam_size: int
    length: int
    lam: float
    quirks: Quirks

    @property
    def units(self) -> int:
        """Units per beam search: the planned batch."""
        return REFERENCE_UNITS if self.quirks.batch_dependent_length else UNITS


def _settle(search: Search, captioner: Captioner) -> _Settled:
    return _Settled(
        search.decoder,
        captioner.beam_size if search.beam_size is None else search.beam_size,
        captioner.length if search.length is None else search.length,
        captioner.lam if search.lam is None else search.lam,
        search.quirks,
    )


def search_identity(captioner: Captioner, search: Search) -> dict[str, object]:
    """All that decides candidates besides the encodings."""
    settled = _settle(search, captioner)
    return {
        "kernel": KERNEL_VERSION,
        "captioner": captioner_digest(captioner),
        "beam_size": settled.beam_size,
        "length": settled.length,
        "quirks": settled.quirks,
    }


def candidates_recipe(search: Mapping[str, object], encodings: str, units: tuple[int, ...]) -> Recipe:
    """What decides a layer's candidates.

    Args:
        search: As :func:`search_identity` gives it.
        encodings: Configuration hash of the layer's encodings, all units of them.
        units: The units selected; empty for all.
    """
    return Recipe.of({**search, "encodings": encodings}, units)


def labelers(captioner: Captioner, search: Search) -> dict[str, float]:
    """Labeler → λ of the descriptions that a captioner gives."""
    lams = {LIKELIHOOD: 0.0}
    return lams if captioner.lm is None else {**lams, MILAN: _settle(search, captioner).lam}


def description_recipe(candidates: Recipe, lam: float) -> Recipe:
    """What decides a layer's descriptions by one λ."""
    return Recipe.of({"rescore": 1, "candidates": candidates.whole, "lam": lam, "n_best": N_BEST}, candidates.units)


@dataclass(frozen=True)
class _Layer:
    number: int
    model: str
    layer: str
    recipe: Recipe
    exemplars: str

    @property
    def name(self) -> tuple[str, str]:
        return self.model, self.layer


def run_descriptions(
    storage: Storage,
    models: Mapping[str, Sequence[str]],
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
    captioner = load_captioner(storage, search.decoder)
    name = captioner_name(search.decoder)
    settled = _settle(search, captioner)
    identity = search_identity(captioner, search)
    every: list[_Layer] = []
    for model, paths in models.items():
        for layer in paths:
            keys = {"encoder": captioner.encoder_name, "model": model, "layer": layer}
            recipe = candidates_recipe(identity, storage.whole_of(ENCODINGS, **keys), units)
            every.append(_Layer(len(every), model, layer, recipe, storage.exemplars_of(ENCODINGS, **keys) or ""))
    # Over all layers, so that a job killed while results become public finds its candidates again.
    work = config_hash({"candidates": [layer.recipe.hash for layer in every]})
    layers = [
        layer
        for layer in every
        if storage.why(CANDIDATES, layer.recipe, decoder=name, model=layer.model, layer=layer.layer)
    ]
    if layers:
        _search(storage, work, layers, settled, name, captioner.encoder_name, lm_digest(captioner), resources)
    else:
        storage.remove_work(work)
        say(f"candidates ({name}): all up to date")
    if captioner.lm is None:
        say(f"captioner {name} has no language model: described by log p(d|E) alone ({LIKELIHOOD})")
    lams = labelers(captioner, search)
    tasks = [_Rescore(storage, name, layer, labeler, lam) for layer in every for labeler, lam in lams.items()]
    stale = [task for task in tasks if not task.done()]
    for _ in run_parallel(_rescore, stale):
        pass


def _search(
    storage: Storage,
    work: str,
    layers: list[_Layer],
    search: _Settled,
    name: str,
    encoder: str,
    lm: str | None,
    resources: Resources,
) -> None:
    done = set(storage.work_names(work))
    rows: list[Row] = []
    units = 0
    for layer in layers:
        encoded = storage.read(ENCODINGS, ["unit"], encoder=encoder, model=layer.model, layer=layer.layer)
        present = sorted(set(only_units(encoded, layer.recipe.units)["unit"].to_pylist()))
        for start in range(0, len(present), search.units):
            batch = present[start : start + search.units]
            if f"L{layer.number}/{batch[0]:06d}" not in done:
                rows.append({"layer": layer.number, "units": batch})
                units += len(batch)
    say(f"descriptions: {units} units of {len({layer.model for layer in layers})} models by {name}")
    arguments = {
        "storage": storage,
        "work": work,
        "layers": {layer.number: layer for layer in layers},
        "search": search,
        "encoder": encoder,
        "threads": resources.threads,
        "device": resources.device,
    }
    names = {layer.number: layer.name for layer in layers}
    seconds: dict[int, float] = defaultdict(float)
    with Progress("descriptions", units, "units", (names[row["layer"]] for row in rows)) as progress:
        for answer in run_pool(CandidateWorker, arguments, rows, resources):
            progress.advance(answer["units"], [names[answer["layer"]]])
            seconds[answer["layer"]] += answer["seconds"]
    tasks = [_Gather(storage, work, layer, name, lm or "", search.beam_size) for layer in layers]
    for index, count in run_parallel(_gather, tasks):
        made = layers[index]
        record_run(
            storage,
            "candidates",
            made.recipe.hash,
            made.model,
            layer=made.layer,
            rows=count,
            images=0,
            seconds=seconds[made.number],
        )
    storage.remove_work(work)


class CandidateWorker:
    """Searches candidates for a batch of units."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        layers: dict[int, _Layer],
        search: _Settled,
        encoder: str,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._layers, self._search = storage, work, layers, search
        self._encoder = encoder
        self._captioner = load_captioner(storage, search.decoder).to(str(resolve_device(device)))
        self._features: tuple[int, dict[int, np.ndarray]] = (-1, {})

    def __call__(self, row: Row) -> Row:
        """Runs one batch of units."""
        layer = self._layers[row["layer"]]
        features = self._of(layer)
        by_count: dict[int, list[int]] = defaultdict(list)
        for unit in row["units"]:
            by_count[len(features[unit])].append(unit)  # dead or broken units may have fewer exemplars
        tables = [self._candidates([(unit, features[unit]) for unit in units]) for units in by_count.values()]
        table = pa.concat_tables(tables).sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
        self._storage.put_work(self._work, f"L{layer.number}/{row['units'][0]:06d}", table)
        return {"layer": layer.number, "units": len(row["units"])}

    def _of(self, layer: _Layer) -> dict[int, np.ndarray]:
        if self._features[0] != layer.number:
            keys = {"encoder": self._encoder, "model": layer.model, "layer": layer.layer}
            table = self._storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys)
            self._features = (layer.number, unit_features(table))
        return self._features[1]

    def _candidates(self, units: list[tuple[int, np.ndarray]]) -> pa.Table:
        found = self._captioner.candidates(
            np.stack([features for _, features in units]),
            self._search.beam_size,
            self._search.length,
            quirks=self._search.quirks,
        )
        beams = found.logp_d_given_e.shape[1]
        logp_d = found.logp_d if found.logp_d is not None else np.zeros_like(found.logp_d_given_e)
        return pa.table(
            {
                "unit": pa.array(np.repeat([unit for unit, _ in units], beams), pa.int32()),
                "beam_rank": pa.array(np.tile(np.arange(beams), len(units)), pa.int32()),
                "tokens": pa.array([t for unit in found.tokens for t in unit], pa.list_(pa.int32())),
                "finished": found.finished.ravel(),
                "logp_d_given_e": found.logp_d_given_e.ravel(),
                "logp_d": logp_d.ravel(),
                "text": [text for unit in found.texts for text in unit],
            },
            schema=_CANDIDATES_SCHEMA,
        )


@dataclass(frozen=True)
class _Gather:
    storage: Storage
    work: str
    layer: _Layer
    decoder: str
    lm: str
    beam_size: int


def _gather(task: _Gather) -> int:
    """Puts a layer's candidates together and makes them public; returns the number of rows."""
    names = task.storage.work_names(task.work, f"L{task.layer.number}")
    empty = _CANDIDATES_SCHEMA.empty_table()
    table = pa.concat_tables([empty, *(task.storage.get_work(task.work, name) for name in names)])
    table = table.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
    keys = {"decoder": task.decoder, "model": task.layer.model, "layer": task.layer.layer}
    columns: dict[str, object] = {name: [value] * len(table) for name, value in keys.items()}
    columns |= {"lm": [task.lm] * len(table), "beam_size": [task.beam_size] * len(table)}
    columns |= {name: table[name] for name in table.column_names}
    rows = CANDIDATES.table(columns, {EXEMPLARS_KEY: task.layer.exemplars})
    task.storage.write(CANDIDATES, rows, task.layer.recipe, **keys)
    return len(rows)


@dataclass(frozen=True)
class _Rescore:
    storage: Storage
    decoder: str
    layer: _Layer
    labeler: str
    lam: float

    @property
    def recipe(self) -> Recipe:
        return description_recipe(self.layer.recipe, self.lam)

    @property
    def keys(self) -> dict[str, str]:
        return {"labeler": self.labeler, "model": self.layer.model, "layer": self.layer.layer}

    def done(self) -> bool:
        return self.storage.why(DESCRIPTIONS, self.recipe, **self.keys) is None


def _rescore(task: _Rescore) -> None:
    """Chooses the best candidates of a layer for one λ."""
    keys = {"decoder": task.decoder, "model": task.layer.model, "layer": task.layer.layer}
    table = only_units(task.storage.read(CANDIDATES, **keys), task.layer.recipe.units).combine_chunks()
    units = table["unit"].to_numpy()
    likely, prior = (table[name].to_numpy() for name in ("logp_d_given_e", "logp_d"))
    scores = rescore(likely, prior, task.lam)
    texts = table["text"].to_pylist()
    has_lm = bool(table["lm"][0].as_py()) if len(table) else False
    rows: list[dict[str, object]] = []
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    ends = np.append(starts[1:], len(units))[: len(starts)]
    for begin, end in zip(starts, ends, strict=True):
        best: list[dict[str, object]] = []
        for place in begin + np.argsort(-scores[begin:end], kind="stable"):
            if all(texts[place] != other["text"] for other in best):  # different tokens may read the same
                best.append(
                    {
                        "text": texts[place],
                        "score": float(scores[place]),
                        "logp_d_given_e": float(likely[place]),
                        "logp_d": float(prior[place]) if has_lm else None,
                    }
                )
            if len(best) == N_BEST:
                break
        rows.append(
            {
                **task.keys,
                "unit": int(units[begin]),
                "description": best[0]["text"],
                "score": best[0]["score"],
                "logp_d_given_e": best[0]["logp_d_given_e"],
                "logp_d": best[0]["logp_d"],
                "lam": task.lam,
                "n_best": best,
            }
        )
    metadata = {"decoder": task.decoder, "lam": str(task.lam), EXEMPLARS_KEY: task.layer.exemplars}
    table = pa.Table.from_pylist(rows, schema=DESCRIPTIONS.schema.with_metadata(metadata))
    task.storage.write(DESCRIPTIONS, table, task.recipe, **task.keys)
