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
from milan_ray.report.images import image_source, mask_strip, write_images
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, LEVELS, RUNS, SCORES, SKIPPED
from milan_ray.schema.table import Noun
from milan_ray.storage import Storage

PAGE_SIZE = 40
"""Unit cards per page."""

_EXAMPLES = 4  # per layer, on the index
_N_BEST = 10
_SKIPPED_LISTED = 100
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
        units: Units in all.
        described: Units with a description.
        mean_score: Mean of the finite scores of the first labeler, None without any.
        examples: A few units, as in the search index.
    """

    model: str
    layer: str
    href: str
    units: int
    described: int
    mean_score: float | None
    examples: list[Row]


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
        for done, keys in enumerate(layers):
            if progress:
                progress(done, len(layers), f"{keys['model']} {keys['layer']}")
            summaries.append(_write_layer(storage, out, env, keys["model"], keys["layer"], shown_labelers, images))
        for (probe, view), image_ids in images.items():
            write_images(storage, out, probe, view, image_ids)
        for asset in ("report.css", "report.js"):
            shutil.copyfile(_TEMPLATES / asset, out / asset)
        index = out / "index.html"
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


def _write_layer(
    storage: Storage,
    out: Path,
    env: Environment,
    model: str,
    layer: str,
    labelers: Sequence[str],
    images: dict[tuple[str, str], set[int]],
) -> LayerSummary:
    """Writes a layer's pages, adds the images they show to `images`, and sums the layer up for the index."""
    href = f"layers/{slug(model)}/{slug(layer)}/"
    folder = out / href
    shutil.rmtree(folder, ignore_errors=True)  # an earlier report may have had more pages
    (folder / "masks").mkdir(parents=True)

    metadata = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
    source = metadata["probe"], metadata["view"]
    shape = int(metadata["mask_height"]), int(metadata["mask_width"])
    exemplars = storage.read(EXEMPLARS, model=model, layer=layer)
    order = np.lexsort((exemplars["rank"].to_numpy(), exemplars["unit"].to_numpy()))
    unit_of = exemplars["unit"].to_numpy()[order]
    levels = {row["unit"]: row for row in _rows(storage, LEVELS, model=model, layer=layer)}
    descriptions = [
        {row["unit"]: row for row in _rows(storage, DESCRIPTIONS, labeler=labeler, model=model, layer=layer)}
        for labeler in labelers
    ]
    annotations = defaultdict(list)
    for keys in storage.partitions(ANNOTATIONS, model=model, layer=layer):
        for row in storage.read(ANNOTATIONS, **keys).to_pylist():
            annotations[row["unit"]].append(row)

    units = sorted({*unit_of.tolist(), *levels})
    starts = range(0, len(units), PAGE_SIZE)
    pages = [
        {"file": _page_file(n), "first": units[s], "last": units[min(s + PAGE_SIZE, len(units)) - 1]}
        for n, s in enumerate(starts)
    ]
    card = env.get_template("card.html")
    entries = []
    for number, start in enumerate(starts):
        cards = []
        for unit in units[start : start + PAGE_SIZE]:
            rows = exemplars.take(order[slice(*np.searchsorted(unit_of, [unit, unit + 1]))]).to_pylist()
            if rows:
                (folder / "masks" / f"{unit}.png").write_bytes(mask_strip([row["mask"] for row in rows], *shape))
            images[source].update(row["image_id"] for row in rows)
            labels = [(name, table[unit]) for name, table in zip(labelers, descriptions, strict=True) if unit in table]
            pictures = [
                {
                    "source": image_source(*source, row["image_id"]),
                    "image_id": row["image_id"],
                    "activation": row["activation"],
                    "offset": 100 * i / max(len(rows) - 1, 1),
                }
                for i, row in enumerate(rows)
            ]
            html = card.render(
                root="../../../",
                unit=unit,
                shape=shape,
                exemplars=pictures,
                level=levels.get(unit),
                labels=labels,
                n_best=_N_BEST,
                annotations=annotations[unit],
            )
            cards.append(Markup(html))
            by_labeler = dict(labels)
            entries.append(
                {
                    "unit": unit,
                    "page": _page_file(number),
                    "image": pictures[0]["source"] if pictures else None,
                    "activation": _finite(pictures[0]["activation"]) if pictures else None,
                    "labels": [by_labeler[name]["description"] if name in by_labeler else "" for name in labelers],
                    "scores": [_finite(by_labeler[name]["score"]) if name in by_labeler else None for name in labelers],
                }
            )
        _render(
            env,
            "layer.html",
            folder / _page_file(number),
            root="../../../",
            model=model,
            layer=layer,
            units=len(units),
            labelers=labelers,
            cards=cards,
            pages=pages,
            number=number,
            shown=start + len(cards),
            metadata=metadata,
        )
        _write_script(folder / f"{_page_file(number)}.js", "milan.cards", _page_file(number), cards)
    _write_script(
        folder / "units.js",
        "milan.layer",
        {"model": model, "layer": layer, "href": href, "shape": shape, "labelers": labelers, "units": entries},
    )
    scores = [entry["scores"][0] for entry in entries if labelers and entry["scores"][0] is not None]
    return LayerSummary(
        model=model,
        layer=layer,
        href=href,
        units=len(units),
        described=sum(any(entry["labels"]) for entry in entries),
        mean_score=math.fsum(scores) / len(scores) if scores else None,
        examples=[{**entry, "shape": shape} for entry in _examples(entries, bool(scores))],
    )


def _page_file(number: int) -> str:
    return f"{number + 1}.html" if number else "index.html"


def _examples(entries: Sequence[Row], scored: bool) -> list[Row]:
    """The best scored units, no description twice; without scores, units spread over the layer."""
    entries = [entry for entry in entries if entry["image"]]
    if not scored:
        return [entries[len(entries) * i // _EXAMPLES] for i in range(min(_EXAMPLES, len(entries)))]
    best: dict[str, Row] = {}
    for entry in sorted(entries, key=lambda e: -math.inf if e["scores"][0] is None else e["scores"][0], reverse=True):
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
    """The rows of a partition; none when it does not exist."""
    return [] if storage.metadata(noun, **keys) is None else storage.read(noun, **keys).to_pylist()


def _read_all(storage: Storage, noun: Noun) -> list[Row]:
    return [row for keys in storage.partitions(noun) for row in storage.read(noun, **keys).to_pylist()]


def _finite(value: float | None) -> float | None:
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    """A figure for people: four significant digits, a true minus sign, a dash where there is none."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _render(env: Environment, template: str, path: Path, **context: Any) -> None:
    path.write_text(env.get_template(template).render(**context), encoding="utf-8")


def _write_script(path: Path, function: str, *arguments: Any) -> None:
    """A script that calls one function with data; JSON in ASCII is always a JavaScript expression."""
    path.write_text(
        f"{function}({', '.join(json.dumps(a, separators=(',', ':')) for a in arguments)});\n", encoding="ascii"
    )
