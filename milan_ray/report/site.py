"""Writes the report: an index, and for every layer pages of unit cards.

The pages are plain files that open from disk: no server, no request to anywhere, readable without JavaScript. A
layer's cards lie in pages of :data:`PAGE_SIZE` units, each written twice: as a page to read, and as a script from
which any other page of the layer fetches the cards it needs when the reader sorts or filters (`file://` allows
scripts, but neither `fetch` nor reading an iframe). Layers are written one by one, cards page by page.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from milan_ray.errors import MilanError, unknown_name
from milan_ray.experiments.comparison import FIGURE
from milan_ray.experiments.differences import difference_config
from milan_ray.progress import say
from milan_ray.report.images import image_source, mask_strip, write_images
from milan_ray.schema import (
    ANNOTATIONS,
    CHANGES,
    DESCRIPTIONS,
    DIFFERENCES,
    EXEMPLARS,
    LEVELS,
    RUNS,
    SCORES,
    SKIPPED,
    TRIALS,
    TRIALS_FIGURE,
)
from milan_ray.schema.table import Noun
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, FILE_NAME, Storage

PAGE_SIZE = 40
"""Unit cards per page."""

_ROOT = "../../../"  # from a layer's pages to the report's folder
_EXAMPLES = 4  # per layer, on the index
_N_BEST = 10
_SKIPPED_LISTED = 100
_WORDS_LISTED = 40
_CHANGES_LISTED = 200
_TEMPLATES = Path(__file__).parent / "templates"

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerSummary:
    """What the index says about a layer.

    Attributes:
        model: The model's name.
        layer: The layer's name.
        href: The layer's folder, relative to the index, with a slash at its end.
        shape: Height and width of its masks.
        units: Units in all.
        described: Units with a description.
        mean_score: Mean of the finite scores of the first labeler, None without any.
        examples: A few units, as in the search index.
        firsts: The first unit of each page.
    """

    model: str
    layer: str
    href: str
    shape: tuple[int, int]
    units: int
    described: int
    mean_score: float | None
    examples: list[Row]
    firsts: list[int]

    def card(self, unit: int) -> str:
        """Where a unit's card is, relative to the index."""
        return f"{self.href}{_page_file(max(0, bisect_right(self.firsts, unit) - 1))}#unit-{unit}"


def write_report(
    storage: Storage,
    out_dir: str | Path,
    *,
    models: Sequence[str] | None = None,
    labelers: Sequence[str] | None = None,
    title: str = "What every unit responds to",
    scores: pa.Table | None = None,
    notes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the static HTML report of a run directory.

    Needs exemplars and views; shows levels, descriptions, annotations, scores, skipped images and runs where there
    are any. Without descriptions it is a plain sheet of exemplars. An existing report in the same folder is replaced;
    the index is written last.

    Args:
        storage: The run directory.
        out_dir: Local folder for the report; made when missing.
        models: Which models; None for all that have exemplars.
        labelers: Whose descriptions, the one whose scores count first; None for all, in alphabetical order.
        title: Heading of the index.
        scores: Evaluation to show (schema :data:`milan_ray.schema.SCORES`); None for all in the run directory.
        notes: Remarks for the index, heading → text.
        progress: Called before each layer and once at the end as `progress(layers done, layers in all, what)`.

    Returns:
        The path of `index.html`.

    Raises:
        MilanError: There are no exemplars, none of a model or labeler that was asked for, a view is missing, or the
            folder cannot be written.
    """
    out = Path(out_dir)
    found = storage.partitions(EXEMPLARS)
    if not found:
        raise MilanError(f"{storage.uri(EXEMPLARS.name)} holds no exemplars; run `python -m jobs.exemplars` first.")
    shown_models = _chosen("model with exemplars", models, [keys["model"] for keys in found])
    known_labelers = [keys["labeler"] for keys in storage.partitions(DESCRIPTIONS) if keys["model"] in shown_models]
    shown_labelers = _chosen("labeler with descriptions", labelers, known_labelers)
    annotation_sources = sorted({keys["source"] for keys in storage.partitions(ANNOTATIONS)})
    layers = sorted(
        (keys for keys in found if keys["model"] in shown_models),
        key=lambda keys: (shown_models.index(keys["model"]), _natural(keys["layer"])),
    )
    env = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["num"] = _number
    images: dict[tuple[str, str], set[int]] = defaultdict(set)
    summaries = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        index = out / "index.html"
        index.unlink(missing_ok=True)  # no index, no report: one that was cut short is not taken for a whole one
        for done, keys in enumerate(layers):
            if progress:
                progress(done, len(layers), f"{keys['model']} {keys['layer']}")
            layer = _Layer.read(storage, keys["model"], keys["layer"], shown_labelers, annotation_sources)
            summaries.append(_write_layer(out, env, layer, images[layer.source]))
        for (probe, view), image_ids in images.items():
            write_images(storage, out, probe, view, image_ids)
        for asset in ("report.css", "report.js"):
            shutil.copyfile(_TEMPLATES / asset, out / asset)
        _render(
            env,
            "index.html",
            index,
            root="",
            title=title,
            models=[(model, list(group)) for model, group in groupby(summaries, key=lambda summary: summary.model)],
            layers=summaries,
            labelers=shown_labelers,
            images=sum(map(len, images.values())),
            evaluations=_evaluations(_read_all(storage, SCORES) if scores is None else scores.to_pylist()),
            score_figures=_score_figures(storage, out) if scores is None else [],
            differences=_differences(storage, summaries),
            figures=_write_figures(storage, out),
            notes=notes or {},
            skipped=_skipped(storage, shown_models),
            skipped_listed=_SKIPPED_LISTED,
            **_provenance(storage, shown_models),
        )
    except OSError as error:
        raise MilanError(f"the report {out} could not be written: {error}; choose a folder that can.") from error
    if progress:
        progress(len(layers), len(layers), "report")
    return index


def slug(name: str) -> str:
    """A file name for any model or layer name: readable, portable, and another one for every other name.

    The digest keeps names apart that differ in letter case (file systems may not) or in odd characters only.
    """
    readable = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


# -- one layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer's tables, ready to be asked for one unit after the other."""

    model: str
    layer: str
    metadata: dict[str, str]
    exemplars: pa.Table
    order: np.ndarray  # rows of `exemplars` by unit and rank
    unit_of: np.ndarray  # the unit of each row in that order
    levels: dict[int, Row]
    descriptions: dict[str, dict[int, Row]]  # labeler → unit → row
    annotations: dict[int, list[Row]]

    @classmethod
    def read(
        cls, storage: Storage, model: str, layer: str, labelers: Sequence[str], annotation_sources: Sequence[str]
    ) -> _Layer:
        keys = {"model": model, "layer": layer}
        exemplars = storage.read(EXEMPLARS, **keys)
        order = np.lexsort((exemplars["rank"].to_numpy(), exemplars["unit"].to_numpy()))
        annotations = defaultdict(list)
        for source in annotation_sources:
            for row in _rows(storage, ANNOTATIONS, source=source, **keys):
                annotations[row["unit"]].append(row)
        return cls(
            model=model,
            layer=layer,
            metadata=storage.metadata(EXEMPLARS, **keys) or {},
            exemplars=exemplars,
            order=order,
            unit_of=exemplars["unit"].to_numpy()[order],
            levels={row["unit"]: row for row in _rows(storage, LEVELS, **keys)},
            descriptions={
                labeler: {row["unit"]: row for row in _rows(storage, DESCRIPTIONS, labeler=labeler, **keys)}
                for labeler in labelers
            },
            annotations=annotations,
        )

    @property
    def href(self) -> str:
        return f"layers/{slug(self.model)}/{slug(self.layer)}/"

    @property
    def source(self) -> tuple[str, str]:
        """Digest of the probe and key of the view: which images the exemplars are."""
        return self.metadata["probe"], self.metadata["view"]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the masks."""
        return int(self.metadata["mask_height"]), int(self.metadata["mask_width"])

    @property
    def units(self) -> list[int]:
        return sorted({*self.unit_of.tolist(), *self.levels})

    def exemplars_of(self, unit: int) -> list[Row]:
        first, last = np.searchsorted(self.unit_of, [unit, unit + 1])
        return self.exemplars.take(self.order[first:last]).to_pylist()

    def labels_of(self, unit: int) -> dict[str, Row]:
        return {labeler: rows[unit] for labeler, rows in self.descriptions.items() if unit in rows}


def _write_layer(out: Path, env: Environment, layer: _Layer, images: set[int]) -> LayerSummary:
    """Writes a layer's pages, adds the images they show to `images`, and sums the layer up for the index."""
    folder = out / layer.href
    if folder.exists():
        shutil.rmtree(folder)  # an earlier report may have had more pages
    (folder / "masks").mkdir(parents=True)

    units, labelers = layer.units, list(layer.descriptions)
    parts = [units[start : start + PAGE_SIZE] for start in range(0, len(units), PAGE_SIZE)]
    pages = [{"file": _page_file(number), "first": part[0], "last": part[-1]} for number, part in enumerate(parts)]
    entries = []
    for number, part in enumerate(parts):
        cards = []
        for unit in part:
            exemplars = layer.exemplars_of(unit)
            if exemplars:
                strip = mask_strip([row["mask"] for row in exemplars], *layer.shape)
                (folder / "masks" / f"{unit}.png").write_bytes(strip)
            images.update(row["image_id"] for row in exemplars)
            cards.append(_card(env, layer, unit, exemplars))
            entries.append(_entry(layer, unit, exemplars, _page_file(number)))
        _render(
            env,
            "layer.html",
            folder / _page_file(number),
            root=_ROOT,
            layer=layer,
            units=len(units),
            labelers=labelers,
            cards=cards,
            pages=pages,
            number=number,
            shown=number * PAGE_SIZE + len(part),
        )
        _write_script(folder / f"{_page_file(number)}.js", "milan.cards", _page_file(number), cards)
    data = {"model": layer.model, "layer": layer.layer, "href": layer.href, "shape": layer.shape, "units": entries}
    _write_script(folder / "units.js", "milan.layer", data)

    scores = [entry["scores"][0] for entry in entries if labelers and entry["scores"][0] is not None]
    return LayerSummary(
        model=layer.model,
        layer=layer.layer,
        href=layer.href,
        shape=layer.shape,
        units=len(units),
        described=sum(any(entry["labels"]) for entry in entries),
        mean_score=math.fsum(scores) / len(scores) if scores else None,
        examples=_examples(entries, bool(scores)),
        firsts=[part[0] for part in parts],
    )


def _card(env: Environment, layer: _Layer, unit: int, exemplars: Sequence[Row]) -> Markup:
    pictures = [
        {**row, "source": image_source(*layer.source, row["image_id"]), "offset": 100 * i / max(len(exemplars) - 1, 1)}
        for i, row in enumerate(exemplars)
    ]
    html = env.get_template("card.html").render(
        root=_ROOT,
        unit=unit,
        shape=layer.shape,
        exemplars=pictures,
        level=layer.levels.get(unit),
        labels=list(layer.labels_of(unit).items()),
        n_best=_N_BEST,
        annotations=layer.annotations.get(unit, []),
    )
    return Markup(html)


def _entry(layer: _Layer, unit: int, exemplars: Sequence[Row], page: str) -> Row:
    """What search, sorting and the index know of a unit."""
    labels = layer.labels_of(unit)
    return {
        "unit": unit,
        "page": page,
        "image": image_source(*layer.source, exemplars[0]["image_id"]) if exemplars else None,
        "activation": _finite(exemplars[0]["activation"]) if exemplars else None,
        "labels": [labels[name]["description"] if name in labels else "" for name in layer.descriptions],
        "scores": [_finite(labels[name]["score"]) if name in labels else None for name in layer.descriptions],
    }


def _page_file(number: int) -> str:
    return f"{number + 1}.html" if number else "index.html"


def _examples(entries: Sequence[Row], scored: bool) -> list[Row]:
    """The best scored units, no description twice; without scores, units spread over the layer."""
    entries = [entry for entry in entries if entry["image"] and not (scored and entry["scores"][0] is None)]
    if not scored:
        return [entries[len(entries) * i // _EXAMPLES] for i in range(min(_EXAMPLES, len(entries)))]
    best: dict[str, Row] = {}
    for entry in sorted(entries, key=lambda entry: entry["scores"][0], reverse=True):
        best.setdefault(entry["labels"][0], entry)
    return list(best.values())[:_EXAMPLES]


# -- the index ------------------------------------------------------------------------------------------------------


def _evaluations(rows: Sequence[Row]) -> list[Row]:
    """Scores as one table per experiment: a row per system, a column per metric."""
    tables = []
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        cells = {(row["system"], row["metric"]): row for row in rows if row["experiment"] == experiment}
        systems = list(dict.fromkeys(system for system, _ in cells))
        metrics = list(dict.fromkeys(metric for _, metric in cells))
        notes: dict[str, list[str]] = defaultdict(list)
        for (system, metric), row in cells.items():
            if row["note"]:
                of_metric = all(other["note"] == row["note"] for (_, m), other in cells.items() if m == metric)
                of_system = all(other["note"] == row["note"] for (s, _), other in cells.items() if s == system)
                about = metric if of_metric else system if of_system else f"{system}, {metric}"
                if about not in notes[row["note"]]:
                    notes[row["note"]].append(about)
        counts = {row["n"] for row in cells.values()}
        tables.append(
            {
                "name": experiment,
                "metrics": metrics,
                "rows": [(system, [cells.get((system, metric)) for metric in metrics]) for system in systems],
                "n": counts.pop() if len(counts) == 1 else None,
                "notes": notes,
            }
        )
    return tables


def _skipped(storage: Storage, models: Sequence[str]) -> list[Row]:
    tables = []
    for model in models:
        rows = _rows(storage, SKIPPED, model=model)
        if rows:
            tables.append(
                {"model": model, "rows": rows, "reasons": Counter(row["reason"] for row in rows).most_common()}
            )
    return tables


def _write_figures(storage: Storage, out: Path) -> list[tuple[str, str]]:
    """Copies the figures that lie beside tables of trials; returns title and file of each."""
    figures = []
    for keys in storage.partitions(TRIALS):
        source = storage.path(TRIALS, **keys).replace(FILE_NAME, TRIALS_FIGURE)
        if storage.exists(source):
            title = f"{keys['decoder']} tuned by {keys['sweep']}"
            file = f"figures/{slug(title)}.svg"
            (out / "figures").mkdir(exist_ok=True)
            (out / file).write_bytes(storage.get(source))
            figures.append((title, file))
    return figures


def _score_figures(storage: Storage, out: Path) -> list[tuple[str, str]]:
    """Copies the figures that lie beside tables of scores; returns the comparison's name and file of each."""
    figures = []
    for keys in storage.partitions(SCORES):
        source = storage.path(SCORES, **keys).replace(FILE_NAME, FIGURE)
        if storage.exists(source):
            title = keys["experiment"].rpartition(": ")[0]
            file = f"figures/{slug(keys['experiment'])}.svg"
            (out / "figures").mkdir(exist_ok=True)
            (out / file).write_bytes(storage.get(source))
            figures.append((title, file))
    return figures


def _differences(storage: Storage, layers: Sequence[LayerSummary]) -> list[Row]:
    """Pairs of networks that were compared, both in the report, as far as their descriptions are those of today."""
    shown = {(layer.model, layer.layer): layer for layer in layers}
    models = {layer.model for layer in layers}
    found = []
    for keys in storage.partitions(DIFFERENCES):
        if not {keys["model"], keys["other"]} <= models:
            continue
        meta = storage.metadata(DIFFERENCES, **keys) or {}
        if meta.get(CONFIG_KEY) != difference_config(storage, **keys, words=json.loads(meta["words"])):
            say(f"report: left out {keys['model']} against {keys['other']}: their descriptions have changed")
            continue
        words = storage.read(DIFFERENCES, **keys).to_pylist()
        changes = storage.read(CHANGES, **keys).to_pylist() if storage.exists(storage.path(CHANGES, **keys)) else []
        worded = [row for row in changes if row["gained"] or row["lost"]]
        for row in worded[:_CHANGES_LISTED]:
            for name in ("model", "other"):
                layer = shown.get((keys[name], row["layer"]))
                row[f"{name}_card"] = layer and layer.card(row["unit"])
        found.append(
            {
                **keys,
                "words": words[:_WORDS_LISTED],
                "all_words": len(words),
                "changed": len(changes),
                "compared": int(meta["units"]),
                "changes": worded[:_CHANGES_LISTED],
                "all_changes": len(worded),
            }
        )
    return found


def _provenance(storage: Storage, models: Sequence[str]) -> Row:
    """What ran for these models, and the versions it ran with."""
    runs = [row for row in _read_all(storage, RUNS) if row["model"] in models or not row["model"]]
    versions: dict[str, list[str]] = {}
    for row in runs:
        for name, version in json.loads(row["versions"] or "{}").items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    return {"runs": sorted(runs, key=lambda row: row["finished_at"]), "versions": versions}


# -- small things ---------------------------------------------------------------------------------------------------


def _chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The wanted names, all of which must be known; all known names in natural order when none are given."""
    if wanted is None:
        return sorted(set(known), key=_natural)
    for name in wanted:
        if name not in known:
            raise unknown_name(kind, name, set(known))
    return list(dict.fromkeys(wanted))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layer10` after `layer9`."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _rows(storage: Storage, noun: Noun, **keys: str) -> list[Row]:
    """A partition's rows; none where it does not exist, or speaks of exemplars that are no longer there."""
    metadata = storage.metadata(noun, **keys)
    if metadata is None:
        return []
    of_exemplars = metadata.get(EXEMPLARS_KEY)
    if of_exemplars and of_exemplars != storage.config_of(EXEMPLARS, model=keys["model"], layer=keys["layer"]):
        say(f"report: left out {noun.name} of {keys['model']} {keys['layer']}: they speak of earlier exemplars")
        return []
    return storage.read(noun, **keys).to_pylist()


def _read_all(storage: Storage, noun: Noun) -> list[Row]:
    return [row for keys in storage.partitions(noun) for row in storage.read(noun, **keys).to_pylist()]


def _finite(value: float | None) -> float | None:
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    """A figure for people: four significant digits, a true minus sign, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}".replace("-", "−")


def _render(env: Environment, template: str, path: Path, **context: Any) -> None:
    path.write_text(env.get_template(template).render(**context), encoding="utf-8")


def _write_script(path: Path, function: str, *arguments: Any) -> None:
    """A script that calls one function with data; JSON in ASCII is always a JavaScript expression."""
    path.write_text(
        f"{function}({', '.join(json.dumps(a, separators=(',', ':')) for a in arguments)});\n", encoding="ascii"
    )
