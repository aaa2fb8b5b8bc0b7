"""Descriptions (paper §3): a beam of candidates for every unit, then log p(d|E) − λ·log p(d).

encodings ─► [actor pool: beam search] ─► candidates ─► [rescore] ─► descriptions
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest as captioner_digest
from milan_ray.captioner.checkpoints import lm_digest
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import FEW_ROWS, beside_others, removed_if_damaged, run_parallel
from milan_ray.labelers.milan import LIKELIHOOD, MILAN, PointwiseMutualInformation
from milan_ray.labelers.protocol import Evidence, Label, Labeler
from milan_ray.progress import Progress, say
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS
from milan_ray.stages.captioners import captioner_name, load_captioner
from milan_ray.stages.encodings import only_units, unit_features
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

WIDE_BEAMS = 4000
"""Beams of all units of a search by mutual information, which is a wide one: what bounds its memory."""

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
        quirks: Defects of the reference to reproduce in log p(d).
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
    """Units per beam search: the planned batch, or where their scores depend on it, the reference's."""
    return REFERENCE_UNITS if quirks.batch_dependent_length else UNITS


@dataclass(frozen=True)
class _Settled:
    """A search with nothing left open."""

    decoder: str
    beam_size: int
    length: int
    lam: float
    quirks: Quirks
    mi_lam: float | None

    @property
    def units(self) -> int:
        """Units per beam search: the planned batch."""
        if self.mi_lam is not None:
            return max(1, WIDE_BEAMS // self.beam_size)
        return units_per_search(self.quirks)


def _settle(search: Search, captioner: Captioner) -> _Settled:
    return _Settled(
        search.decoder,
        captioner.beam_size if search.beam_size is None else search.beam_size,
        captioner.length if search.length is None else search.length,
        captioner.lam if search.lam is None else search.lam,
        search.quirks,
        search.mi_lam,
    )


def search_identity(captioner: Captioner, search: Search) -> dict[str, object]:
    """All that decides candidates besides the encodings."""
    settled = _settle(search, captioner)
    identity: dict[str, object] = {
        "kernel": KERNEL_VERSION,
        "captioner": captioner_digest(captioner),
        "beam_size": settled.beam_size,
        "length": settled.length,
        "quirks": settled.quirks,
    }
    return identity if settled.mi_lam is None else identity | {"mi_lam": settled.mi_lam}


def candidates_recipe(search: Mapping[str, object], encodings: str, units: tuple[int, ...]) -> Recipe:
    """What decides a layer's candidates.

    Args:
        search: As :func:`search_identity` gives it.
        encodings: Configuration hash of the layer's encodings, all units of them.
        units: The units selected; empty for all.
    """
    return Recipe.of({**search, "encodings": encodings}, units)


def labelers(captioner: Captioner, search: Search) -> list[PointwiseMutualInformation]:
    """The labelers that rank what a captioner's own search finds."""
    found = [PointwiseMutualInformation(LIKELIHOOD, 0.0)]
    if captioner.lm is not None:
        found.append(PointwiseMutualInformation(MILAN, _settle(search, captioner).lam))
    return found


def description_recipe(candidates: Recipe, labeler: Labeler, encodings: str | None = None) -> Recipe:
    """What decides a layer's descriptions by one labeler.

    Args:
        candidates: What decides the candidates.
        labeler: The labeler.
        encodings: Configuration hash of the layer's encodings, all units of them, where the labeler compares with them.
    """
    parts = labeler.identity() | {"candidates": candidates.whole}
    return Recipe.of(parts if encodings is None else parts | {"encodings": encodings}, candidates.units)


@dataclass(frozen=True)
class Layer:
    """A layer on its way from encodings to descriptions.

    Attributes:
        number: Its place among the job's layers.
        model: Name of the model.
        layer: Module path.
        recipe: What decides its candidates.
        exemplars: Configuration hash of the exemplars.
    """

    number: int
    model: str
    layer: str
    recipe: Recipe
    exemplars: str

    @property
    def name(self) -> tuple[str, str]:
        """(model, layer)."""
        return self.model, self.layer


@beside_others
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
    layers = run_candidates(storage, models, search, captioner, resources, units)
    if captioner.lm is None:
        say(f"captioner {search.name} has no language model: described by log p(d|E) alone ({LIKELIHOOD})")
    tasks = [_Rank(storage, search.name, layer, labeler) for layer in layers for labeler in labelers(captioner, search)]
    stale = [task for task in tasks if not task.done()]
    rows = sum(storage.count(CANDIDATES, decoder=search.name, model=one.model, layer=one.layer) for one in layers)
    for _ in run_parallel(_rank, stale, here=rows <= FEW_ROWS):
        pass


def run_candidates(
    storage: Storage,
    models: Mapping[str, Sequence[str]],
    search: Search,
    captioner: Captioner,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> list[Layer]:
    """Searches candidates of every unit of every layer where they are missing or stale; returns all layers.

    Args:
        storage: The run directory, which holds encodings.
        models: Model name → layers.
        search: Captioner, beam.
        captioner: The search's captioner.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to describe; empty for all.

    Raises:
        MilanError: Encodings are missing.
    """
    settled, name = _settle(search, captioner), search.name
    identity = search_identity(captioner, search)
    every: list[Layer] = []
    for model, paths in models.items():
        for layer in paths:
            keys = {"encoder": captioner.encoder_name, "model": model, "layer": layer}
            recipe = candidates_recipe(identity, storage.whole_of(ENCODINGS, **keys), units)
            every.append(Layer(len(every), model, layer, recipe, storage.exemplars_of(ENCODINGS, **keys) or ""))
    # Over all layers, so that a job killed while results become public finds its candidates again.
    work = config_hash({"candidates": [layer.recipe.hash for layer in every]})
    layers = [
        layer
        for layer in every
        if storage.why(CANDIDATES, layer.recipe, decoder=name, model=layer.model, layer=layer.layer)
    ]
    if layers:
        with removed_if_damaged(storage, work):
            _search(storage, work, layers, settled, name, captioner.encoder_name, lm_digest(captioner), resources)
    else:
        storage.remove_work(work)
        say(f"candidates ({name}): all up to date")
    return every


def _search(
    storage: Storage,
    work: str,
    layers: list[Layer],
    search: _Settled,
    name: str,
    encoder: str,
    lm: str | None,
    resources: Resources,
) -> None:
    done = set(storage.work_names(work))
    parts: dict[int, list[str]] = defaultdict(list)
    rows: list[Row] = []
    units = total = 0
    for layer in layers:
        encoded = storage.read(ENCODINGS, ["unit"], encoder=encoder, model=layer.model, layer=layer.layer)
        present = sorted(set(only_units(encoded, layer.recipe.units)["unit"].to_pylist()))
        total += len(present)
        for start in range(0, len(present), search.units):
            batch = present[start : start + search.units]
            parts[layer.number].append(f"L{layer.number}/{batch[0]:06d}")
            if parts[layer.number][-1] not in done:
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
    costs = {layer.number: Cost() for layer in layers}
    with Progress("descriptions", units, "units", (names[row["layer"]] for row in rows)) as progress:
        for answer in run_pool(CandidateWorker, arguments, rows, resources):
            progress.advance(answer["units"], [names[answer["layer"]]])
            costs[answer["layer"]].add(answer["seconds"])
    tasks = [
        _Gather(
            storage,
            work,
            layer,
            name,
            lm or "",
            search.beam_size,
            tuple(parts[layer.number]),
            costs[layer.number],
        )
        for layer in layers
    ]
    for _ in run_parallel(_gather, tasks, here=total * search.beam_size <= FEW_ROWS):
        pass
    storage.remove_work(work)


class CandidateWorker:
    """Searches candidates for a batch of units."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        layers: dict[int, Layer],
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

    def _of(self, layer: Layer) -> dict[int, np.ndarray]:
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
            self._search.mi_lam,
            self._search.quirks,
        )
        beams = found.logp_d_given_e.shape[1]
        logp_d = found.logp_d if found.logp_d is not None else np.zeros_like(found.logp_d_given_e)
        return pa.table(
            {
                "unit": pa.array(np.repeat([unit for unit, _ in units], beams), pa.int32()),
                "beam_rank": pa.array(np.tile(np.arange(beams), len(units)), pa.int32()),
                "tokens": pa.array([t for unit in found.tokens for t in unit], pa.list_(pa.int32())),
                "finished": found.finished.ravel(),
                "logp_d_given_e": found.likelihood(self._search.mi_lam).ravel(),
                "logp_d": logp_d.ravel(),
                "text": [text for unit in found.texts for text in unit],
            },
            schema=_CANDIDATES_SCHEMA,
        )


@dataclass(frozen=True)
class _Gather:
    storage: Storage
    work: str
    layer: Layer
    decoder: str
    lm: str
    beam_size: int
    parts: tuple[str, ...]
    cost: Cost


def _gather(task: _Gather) -> None:
    """Puts a layer's candidates together and makes them public."""
    empty = _CANDIDATES_SCHEMA.empty_table()
    table = pa.concat_tables([empty, *(task.storage.get_work(task.work, name) for name in task.parts)])
    table = table.sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
    keys = {"decoder": task.decoder, "model": task.layer.model, "layer": task.layer.layer}
    columns: dict[str, object] = {name: [value] * len(table) for name, value in keys.items()}
    columns |= {"lm": [task.lm] * len(table), "beam_size": [task.beam_size] * len(table)}
    columns |= {name: table[name] for name in table.column_names}
    rows = CANDIDATES.table(columns, {EXEMPLARS_KEY: task.layer.exemplars})
    run, model, layer = task.layer.recipe.hash, task.layer.model, task.layer.layer
    record_run(task.storage, "candidates", run, model, layer=layer, rows=len(rows), cost=task.cost)
    task.storage.write(CANDIDATES, rows, task.layer.recipe, **keys)


@dataclass(frozen=True)
class _Rank:
    storage: Storage
    decoder: str
    layer: Layer
    labeler: PointwiseMutualInformation

    @property
    def recipe(self) -> Recipe:
        return description_recipe(self.layer.recipe, self.labeler)

    def done(self) -> bool:
        return described(self.storage, self.layer, self.labeler, self.recipe)


def _rank(task: _Rank) -> None:
    """Ranks the candidates of a layer."""
    evidence = Evidence(read_candidates(task.storage, task.decoder, task.layer))
    labels = task.labeler.label(evidence)
    write_labels(task.storage, task.decoder, task.layer, task.labeler, task.recipe, labels)


def read_candidates(storage: Storage, decoder: str, layer: Layer, columns: Sequence[str] | None = None) -> pa.Table:
    """A layer's candidates, of the units selected, by unit and beam rank."""
    table = storage.read(CANDIDATES, columns, decoder=decoder, model=layer.model, layer=layer.layer)
    return only_units(table, layer.recipe.units).combine_chunks()


def described(storage: Storage, layer: Layer, labeler: Labeler, recipe: Recipe) -> bool:
    """Whether a layer's descriptions by a labeler are there."""
    return storage.why(DESCRIPTIONS, recipe, labeler=labeler.name, model=layer.model, layer=layer.layer) is None


def write_labels(
    storage: Storage,
    decoder: str,
    layer: Layer,
    labeler: Labeler,
    recipe: Recipe,
    labels: Mapping[int, Sequence[Label]],
) -> None:
    """Writes a layer's descriptions.

    Args:
        storage: The run directory.
        decoder: Which candidates were labels to choose from.
        layer: The layer.
        labeler: Whose labels they are.
        recipe: What decides them.
        labels: Unit → its labels, best first.
    """
    keys = {"labeler": labeler.name, "model": layer.model, "layer": layer.layer}
    rows = [
        {
            **keys,
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
    metadata = {"decoder": decoder, EXEMPLARS_KEY: layer.exemplars}
    if labeler.lam is not None:
        metadata["lam"] = str(labeler.lam)
    table = pa.Table.from_pylist(rows, schema=DESCRIPTIONS.schema.with_metadata(metadata))
    storage.write(DESCRIPTIONS, table, recipe, **keys)
