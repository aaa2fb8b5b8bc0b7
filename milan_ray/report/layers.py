"""Writes a layer's page and its data: an index of its units, their cards page by page, and their masks.

The page is an empty frame that its scripts fill. `units.js` holds the layer column by column and is small enough for
searches over a whole zoo. `cards/N.js` holds all data on the N-th :data:`PAGE_SIZE` units. The only file of a single
unit is its strip of masks; a unit's page is the layer's page with the fragment `#unit-12`.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from milan_ray.damaged import LeftOut
from milan_ray.exemplars.masks import mask_size
from milan_ray.exemplars.ties import Ties, ties_of_tables
from milan_ray.progress import say
from milan_ray.report.effects import read_effects
from milan_ray.report.images import image_folder, image_source, write_masks
from milan_ray.report.judged import OF_EXEMPLARS, failing_scores, scores_of, verdicts_of
from milan_ray.report.nearest import mean_features, nearest
from milan_ray.report.pages import Pages, Row, short, slug, write_script
from milan_ray.schema import (
    ANNOTATIONS,
    DESCRIPTIONS,
    ENCODINGS,
    EXEMPLARS,
    LEVELS,
    MANIFEST,
    UNIT_SCORES,
    VERDICTS,
    Table,
)
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, Storage

PAGE_SIZE = 40
"""Unit cards per page, and per script."""

ROOT = "../../../"
"""Relative path from a layer's page to the report's folder."""

_EXAMPLES = 12  # per layer, on its model's page; the overview shows the first of them
_MOST_SAID = 5
_NEAREST = 8
_N_BEST = 10
_MASKS = 1  # version of the output of mask_strip


@dataclass(frozen=True)
class Sources:
    """The parts of the run directory that the layers' pages show.

    Attributes:
        storage: The run directory.
        labelers: Labelers whose descriptions are shown, the main one first.
        annotations: Sources of annotations.
        encodings: (model, layer) → encoders that have encoded its exemplars.
        scores: (model, layer) → partitions of unit_scores.
        verdicts: (model, layer) → partitions of verdicts.
        failing: Metric → tests of scores that it fails on a probe of this storage.
        left_out: Records which damaged tables are not shown.
    """

    storage: Storage
    labelers: tuple[str, ...]
    annotations: tuple[str, ...]
    encodings: dict[tuple[str, str], list[str]]
    scores: dict[tuple[str, str], list[dict[str, str]]]
    verdicts: dict[tuple[str, str], list[dict[str, str]]]
    failing: dict[str, list[str]]
    left_out: LeftOut

    @classmethod
    def find(cls, storage: Storage, labelers: Sequence[str], left_out: LeftOut) -> Sources:
        """Lists the tables of the run directory once for all layers."""
        encodings, scores, verdicts = (defaultdict(list) for _ in range(3))
        for keys in storage.partitions(ENCODINGS):
            encodings[keys["model"], keys["layer"]].append(keys["encoder"])
        for keys in storage.partitions(UNIT_SCORES):
            scores[keys["model"], keys["layer"]].append(keys)
        for keys in storage.partitions(VERDICTS):
            verdicts[keys["model"], keys["layer"]].append(keys)
        annotations = sorted({keys["source"] for keys in storage.partitions(ANNOTATIONS)})
        shared = (storage, tuple(labelers), tuple(annotations))
        failed = failing_scores(storage, left_out)
        return cls(*shared, dict(encodings), dict(scores), dict(verdicts), failed, left_out)

    def shown(self, partitions: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The partitions of shown labelers, in their order, and then those of exemplars."""
        judged = (*self.labelers, OF_EXEMPLARS)
        return sorted((at for at in partitions if at["labeler"] in judged), key=lambda at: judged.index(at["labeler"]))

    def rows(self, table: Table, **keys: str) -> pa.Table:
        """Reads a partition's rows by :func:`read_rows`; returns none if the partition is damaged."""
        read = partial(read_rows, self.storage, table, **keys)
        return self.left_out.unless_damaged(read, table.schema.empty_table())

    def all_rows(self, table: Table, **where: str) -> list[Row]:
        """Reads the rows of all undamaged partitions of a table."""
        empty = table.schema.empty_table()
        reads = [partial(self.storage.read, table, **keys) for keys in self.storage.partitions(table, **where)]
        return [row for read in reads for row in self.left_out.unless_damaged(read, empty).to_pylist()]

    def named(self, probe: str) -> bool:
        """Whether a manifest with the names of a probe's images exists."""
        look = partial(self.storage.metadata, MANIFEST, probe=probe)
        return self.left_out.unless_damaged(look, None) is not None


@dataclass(frozen=True)
class LayerSummary:
    """Data on a layer for the overview and the model's page.

    Attributes:
        model: The model's name.
        layer: The layer's name.
        href: The layer's folder, relative to the report's, with a slash at its end.
        masks: The folder of its masks, in the same form.
        shape: Height and width of its masks.
        units: Number of units.
        described: Number of units with a description.
        doubtful: Number of units whose exemplars or masks mean nothing.
        means: For each labeler, the mean of its finite scores; None if it has none.
        examples: A few units: unit, image, description.
        said: The main labeler's descriptions, with their units, most frequent first.
        columns: Keys that the units can be sorted by, key → name.
    """

    model: str
    layer: str
    href: str
    masks: str
    shape: tuple[int, int]
    units: int
    described: int
    doubtful: int
    means: list[float | None]
    examples: list[Row]
    said: list[tuple[str, int]]
    columns: dict[str, str]

    @property
    def distinct(self) -> int:
        """Number of the main labeler's distinct descriptions."""
        return len(self.said)

    @property
    def most_said(self) -> list[tuple[str, int]]:
        """The most frequent descriptions."""
        return self.said[:_MOST_SAID]

    def card(self, unit: int) -> str:
        """Returns the link to a unit's page, relative to the report's folder."""
        return f"{self.href}index.html#unit-{unit}"


class _ByUnit:
    """A partition's rows, sorted for access by ranges of units."""

    def __init__(self, table: pa.Table, then: str | None = None) -> None:
        unit = table["unit"].to_numpy()
        order = np.lexsort((table[then].to_numpy(), unit)) if then else np.argsort(unit, kind="stable")
        in_order = bool((order[1:] > order[:-1]).all())
        self._table = table if in_order else table.take(pa.array(order))
        self.unit_of = unit[order]

    def rows(self, units: Sequence[int]) -> dict[int, list[Row]]:
        """Returns the rows of ``units``, which must be ascending and contain all of the table's units in that range."""
        start, stop = np.searchsorted(self.unit_of, [units[0], units[-1] + 1])
        rows: dict[int, list[Row]] = defaultdict(list)
        for row in self._table.slice(start, stop - start).to_pylist():
            rows[row["unit"]].append(row)
        return rows


@dataclass
class _Layer:
    """A layer's tables, without masks, and the data collected from them for the index."""

    sources: Sources
    model: str
    layer: str
    metadata: dict[str, str]
    exemplars: _ByUnit
    levels: _ByUnit
    ties: Ties  # of all units
    descriptions: dict[str, _ByUnit]
    annotations: list[_ByUnit]
    scores: dict[tuple[str, str], _ByUnit]  # (predictor, labeler) → rows
    effects: dict[int, Row]
    verdicts: dict[tuple[str, str], _ByUnit]  # the same of verdicts
    first: list[int | None] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)  # description → number
    labels: list[list[int]] = field(default_factory=list)  # per labeler and unit, a number from texts, or −1
    columns: dict[str, Row] = field(default_factory=dict)
    stale: int = 0  # number of scores of earlier descriptions

    @classmethod
    def read(cls, sources: Sources, model: str, layer: str) -> _Layer:
        storage, keys = sources.storage, {"model": model, "layer": layer}
        columns = [column.name for column in EXEMPLARS.columns if column.name not in ("model", "layer", "mask")]
        descriptions = {name: sources.rows(DESCRIPTIONS, labeler=name, **keys) for name in sources.labelers}
        shown, judged = (sources.shown(at.get((model, layer), [])) for at in (sources.scores, sources.verdicts))
        annotations = [sources.rows(ANNOTATIONS, source=source, **keys) for source in sources.annotations]
        exemplars, levels = storage.read(EXEMPLARS, columns, **keys), sources.rows(LEVELS, **keys)
        metadata = storage.metadata(EXEMPLARS, **keys) or {}
        return cls(
            sources=sources,
            model=model,
            layer=layer,
            metadata=metadata,
            exemplars=_ByUnit(exemplars, "rank"),
            levels=_ByUnit(levels),
            ties=ties_of_tables(exemplars, levels, metadata),
            descriptions={name: _ByUnit(table) for name, table in descriptions.items()},
            annotations=[_ByUnit(table) for table in annotations if len(table)],
            scores={(at["predictor"], at["labeler"]): _ByUnit(sources.rows(UNIT_SCORES, **at)) for at in shown},
            effects=sources.left_out.unless_damaged(partial(read_effects, storage, model, layer, metadata), {}),
            verdicts={(at["predictor"], at["labeler"]): _ByUnit(sources.rows(VERDICTS, **at)) for at in judged},
        )

    @property
    def failing(self) -> dict[str, list[str]]:
        return self.sources.failing

    @property
    def keys(self) -> dict[str, str]:
        return {"model": self.model, "layer": self.layer}

    @property
    def href(self) -> str:
        return layer_folder(self.model, self.layer)

    @property
    def masks(self) -> str:
        """The masks' folder. Its name changes with the masks, so that existing masks need not be rendered again."""
        return f"{self.href}masks-{_MASKS}-{slug(self.metadata[CONFIG_KEY])}/"

    @property
    def source(self) -> tuple[str, str]:
        """Digest of the probe and key of the view, which identify the exemplars' images."""
        return self.metadata["probe"], self.metadata["view"]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the masks."""
        return mask_size(self.metadata)

    @property
    def units(self) -> list[int]:
        return sorted({*self.exemplars.unit_of.tolist(), *self.levels.unit_of.tolist()})

    def nearest(self) -> dict[int, list[tuple[int, float]]]:
        """Returns each unit's nearest units by its exemplars' encodings, if these exist on this machine."""
        for encoder in (
            self.sources.encodings.get((self.model, self.layer), []) if self.sources.storage.is_local else []
        ):
            means = self.sources.left_out.unless_damaged(partial(self._means, encoder), None)
            if means is not None:
                units, features = means
                places, cosines = nearest(features, _NEAREST)
                return {
                    unit: [(int(units[place]), float(short(cosine) or 0)) for place, cosine in zip(*row, strict=True)]
                    for unit, row in zip(units.tolist(), zip(places, cosines.tolist(), strict=True), strict=True)
                }
        return {}

    def _means(self, encoder: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns units and their mean encodings; None if the encodings are of other exemplars."""
        storage, at = self.sources.storage, {"encoder": encoder, **self.keys}
        if storage.exemplars_of(ENCODINGS, **at) not in (None, self.metadata.get(CONFIG_KEY)):
            return None
        return mean_features(storage.stream(ENCODINGS, ["unit", "feature"], **at))


def write_layer(
    out: Path,
    pages: Pages,
    sources: Sources,
    model: str,
    layer: str,
    siblings: Sequence[str],
    images: dict[tuple[str, str], set[int]],
) -> LayerSummary:
    """Writes a layer's page and data.

    Args:
        out: The report's folder.
        pages: Writes pages.
        sources: The data to show.
        model: The model's name.
        layer: The layer's name.
        siblings: The model's layers in the report, including this one, as named by :func:`layer_folder`.
        images: (probe, view) → images shown; this layer's images are added to it.

    Returns:
        The layer's data for the overview.

    Raises:
        DamagedTable: The layer's exemplars are damaged.
    """
    content = _Layer.read(sources, model, layer)
    folder, units = out / content.href, content.units
    _tidy(out, content)
    if not (out / content.masks).exists():
        pieces = sources.storage.stream(EXEMPLARS, ["unit", "rank", "mask"], **content.keys)
        counts = Counter(content.exemplars.unit_of.tolist())
        write_masks(pieces, counts, content.shape, out / content.masks)
    near = content.nearest()
    content.labels = [[] for _ in sources.labelers]
    shown = images[content.source]
    for number, start in enumerate(range(0, len(units), PAGE_SIZE)):
        part = units[start : start + PAGE_SIZE]
        cards = list(_cards(content, part, start, len(units), near))
        for card in cards:
            shown.update(card["images"])
        write_script(folder / "cards" / f"{number}.js", "milan.cards", content.href, number, cards)
    if content.stale:
        say(f"report: left out {content.stale} scores and verdicts on earlier descriptions of {model} {layer}")
    columns = {key: column for key, column in content.columns.items() if any(v is not None for v in column["values"])}
    write_script(
        folder / "units.js",
        "milan.layer",
        {
            "model": model,
            "layer": layer,
            "href": content.href,
            "images": f"{image_folder(*content.source)}/",
            "masks": content.masks,
            "named": sources.named(content.source[0]),
            "shape": content.shape,
            "page": PAGE_SIZE,
            "labelers": sources.labelers,
            "units": units,
            "first": content.first,
            "texts": list(content.texts),
            "labels": content.labels,
            "columns": columns,
        },
    )
    summary = _summary(content, units, {key: column["name"] for key, column in columns.items()})
    pages.write(
        "layer.html",
        folder / "index.html",
        root=ROOT,
        summary=summary,
        siblings=siblings,
        metadata=content.metadata,
        page_size=PAGE_SIZE,
    )
    return summary


def layer_folder(model: str, layer: str) -> str:
    """Returns a layer's folder, relative to the report's, with a slash at its end."""
    return f"layers/{slug(model)}/{slug(layer)}/"


def read_rows(storage: Storage, table: Table, **keys: str) -> pa.Table:
    """Reads a partition's rows; returns none if it does not exist, or refers to exemplars that no longer exist."""
    metadata = storage.metadata(table, **keys)
    if metadata is None:
        return table.schema.empty_table()
    of_exemplars = metadata.get(EXEMPLARS_KEY)
    if of_exemplars and of_exemplars != storage.config_of(EXEMPLARS, model=keys["model"], layer=keys["layer"]):
        say(f"report: left out {table.name} of {keys['model']} {keys['layer']}: they speak of earlier exemplars")
        return table.schema.empty_table()
    wanted = [column.name for column in table.columns if column.name not in ("model", "layer")]
    return storage.read(table, wanted, **keys)


def _tidy(out: Path, layer: _Layer) -> None:
    """Removes the files of an earlier report from a layer's folder, except unchanged masks."""
    folder = out / layer.href
    for path in folder.iterdir() if folder.exists() else ():
        if path == out / layer.masks:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _cards(
    layer: _Layer, units: Sequence[int], start: int, total: int, near: dict[int, list[tuple[int, float]]]
) -> Iterator[Row]:
    """Yields the cards of some units, and adds these units to the layer's index."""
    exemplars, levels = layer.exemplars.rows(units), layer.levels.rows(units)
    labels = {name: rows.rows(units) for name, rows in layer.descriptions.items()}
    annotations = [table.rows(units) for table in layer.annotations]
    scores = {key: rows.rows(units) for key, rows in layer.scores.items()}
    verdicts = {key: rows.rows(units) for key, rows in layer.verdicts.items()}
    for place, unit in enumerate(units, start):
        put = partial(_put, layer.columns, total, place)
        mine = exemplars.get(unit, [])
        current: list[Row | None] = []
        for number, (name, rows) in enumerate(labels.items()):
            row = rows[unit][0] if unit in rows else None
            layer.labels[number].append(layer.texts.setdefault(row["description"], len(layer.texts)) if row else -1)
            put(f"score {name}", "score" if len(labels) == 1 else f"{name}: score", row["score"] if row else None)
            current.append(row and _label(row))
        level = levels[unit][0] if unit in levels else None
        layer.first.append(mine[0]["image_id"] if mine else None)
        put("activation", "highest activation", mine[0]["activation"] if mine else None)
        put("level", "level η", level["level"] if level else None)
        effect = layer.effects.get(unit)
        put("effect", "probability moved when ablated", effect["changes"][0]["moved"] if effect else None)
        yield {
            "unit": unit,
            "images": [row["image_id"] for row in mine],
            "activations": [short(row["activation"]) for row in mine],
            "level": level and [short(level["level"]), level["positions"], level["nonfinite"], level["exact"]],
            "doubt": layer.ties.of_unit(place),
            "labels": current,
            "annotations": [
                [row["text"], row["annotator"], row["source"]] for table in annotations for row in table.get(unit, [])
            ],
            "effect": effect,
            "scores": list(scores_of(layer, unit, scores, current, put)),
            "verdicts": list(verdicts_of(layer, unit, verdicts, current, put)),
            "near": near.get(unit, []),
        }


def _put(columns: dict[str, Row], total: int, place: int, key: str, name: str, value: float | None) -> None:
    column = columns.setdefault(key, {"name": name, "values": [None] * total})
    column["values"][place] = short(value)


def _label(row: Row) -> Row:
    figures = ("score", "logp_d_given_e", "logp_d")
    return {
        "text": row["description"],
        **{name: short(row[name]) for name in (*figures, "lam")},
        "best": [[best["text"], *(short(best[name]) for name in figures)] for best in (row["n_best"] or [])[:_N_BEST]],
    }


def _summary(layer: _Layer, units: Sequence[int], columns: dict[str, str]) -> LayerSummary:
    names = layer.sources.labelers
    values = [layer.columns[f"score {name}"]["values"] if units else [] for name in names]
    finite = [[value for value in of if value is not None] for of in values]
    texts = list(layer.texts)
    labels = layer.labels[0] if names else []
    return LayerSummary(
        model=layer.model,
        layer=layer.layer,
        href=layer.href,
        masks=layer.masks,
        shape=layer.shape,
        units=len(units),
        described=sum(any(of[place] >= 0 for of in layer.labels) for place in range(len(units))),
        doubtful=int(layer.ties.doubtful.sum()),
        means=[math.fsum(of) / len(of) if of else None for of in finite],
        examples=_examples(layer, units, values[0] if names and finite[0] else None),
        said=[(texts[n], count) for n, count in Counter(n for n in labels if n >= 0).most_common()],
        columns=columns,
    )


def _examples(layer: _Layer, units: Sequence[int], scores: Sequence[float | None] | None) -> list[Row]:
    """Selects the units with the best scores and distinct descriptions; without scores, evenly spaced units."""
    texts = list(layer.texts)
    places = [place for place, image in enumerate(layer.first) if image is not None]
    if scores is None:
        places = [places[len(places) * i // _EXAMPLES] for i in range(min(_EXAMPLES, len(places)))]
    else:
        best: dict[int, int] = {}
        ranked = [(-score, place) for place in places if (score := scores[place]) is not None]
        for _, place in sorted(ranked):
            best.setdefault(layer.labels[0][place], place)
        places = list(best.values())[:_EXAMPLES]
    return [
        {
            "unit": units[place],
            "image": image_source(*layer.source, int(layer.first[place] or 0)),
            "description": texts[layer.labels[0][place]] if layer.labels and layer.labels[0][place] >= 0 else None,
        }
        for place in places
    ]
