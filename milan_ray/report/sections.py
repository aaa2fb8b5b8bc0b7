"""Sections of the overview and the models' pages besides layers: evaluations, figures, differences, runs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from milan_ray.errors import DamagedTable
from milan_ray.progress import say
from milan_ray.report.judged import failure
from milan_ray.report.layers import LayerSummary, Sources
from milan_ray.report.pages import Pages, Row, slug, write_script
from milan_ray.schema import ABLATIONS, CHANGES, DIFFERENCES, FIGURE, RUNS, SCORES, SKIPPED, TABLES, TRIALS, Table
from milan_ray.scoring.differences import difference_config
from milan_ray.storage import CONFIG_KEY, FILE_NAME, Storage

_WORDS_LISTED = 40
_WORDS_SHOWN = 10
_FIGURE = f"{FIGURE}.svg"
_CHANGE = ("unit", "description", "other_description", "gained", "lost")


_ABOUT = {
    SCORES.name: "What was measured, a panel each: a row per labeler, with trivial baselines below",
    TRIALS.name: "Score over λ, a line per beam size",
    ABLATIONS.name: "Accuracy over the share of units switched off, a line per order",
}


@dataclass(frozen=True)
class Figure:
    """A figure that is stored next to a table.

    Attributes:
        title: Title of the figure.
        file: Its copy, relative to the report's folder.
        about: Alternative text.
        model: The model that the figure is about; None if there is no single one.
    """

    title: str
    file: str
    about: str
    model: str | None


def evaluations(rows: Sequence[Row], failing: Mapping[str, Sequence[str]]) -> list[Row]:
    """Arranges scores as one table per experiment, with a row per system and a column per metric.

    Args:
        rows: Rows of schema SCORES.
        failing: Metric → tests of scores that it fails; its name says so.
    """
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
                "model": experiment.rpartition(": ")[2] if ": " in experiment else None,
                "metrics": [f"{metric}{failure(failing.get(metric))}" for metric in metrics],
                "rows": [(system, [cells.get((system, metric)) for metric in metrics]) for system in systems],
                "n": counts.pop() if len(counts) == 1 else None,
                "notes": notes,
            }
        )
    return tables


def skipped(sources: Sources, models: Sequence[str]) -> list[Row]:
    """Lists models with skipped images: the rows, and the reasons with their frequencies."""
    tables = []
    for keys in sources.storage.partitions(SKIPPED):
        model = keys["model"]
        rows = sources.all_rows(SKIPPED, model=model) if model in models else []
        if rows:
            tables.append(
                {"model": model, "rows": rows, "reasons": Counter(row["reason"] for row in rows).most_common()}
            )
    return tables


def figures(storage: Storage, out: Path) -> list[Figure]:
    """Copies the figures that are stored next to tables of experiments and tunings of any kind."""
    copies = []
    for table in (table for table in TABLES if {"experiment", "sweep"} & {*table.partition}):
        for keys in storage.partitions(table):
            source = storage.path(table, **keys).replace(FILE_NAME, _FIGURE)
            if not storage.exists(source):
                continue
            title = _title(table, keys)
            file = f"figures/{slug(title if table is TRIALS else source)}.svg"
            (out / "figures").mkdir(exist_ok=True)
            (out / file).write_bytes(storage.get(source))
            about = _ABOUT.get(table.name, f"Figure of the table {table.name}")
            copies.append(Figure(title, file, about, keys.get("model")))
    return copies


def differences(out: Path, pages: Pages, sources: Sources, layers: Sequence[LayerSummary]) -> list[Row]:
    """Writes a page for each pair of networks that were compared and are both in the report.

    Pairs are left out if their descriptions have changed since the comparison.

    Returns:
        For each pair, its row in the overview.
    """
    storage = sources.storage
    shown = {(layer.model, layer.layer): layer for layer in layers}
    models = {layer.model for layer in layers}
    pairs = []
    for keys in storage.partitions(DIFFERENCES):
        if not {keys["model"], keys["other"]} <= models:
            continue
        try:
            meta = storage.metadata(DIFFERENCES, **keys) or {}
            if meta.get(CONFIG_KEY) != difference_config(storage, **keys, words=json.loads(meta["words"])):
                say(f"report: left out {keys['model']} against {keys['other']}: their descriptions have changed")
                continue
            compared = int(meta["units"])
            words = storage.read(DIFFERENCES, **keys).to_pylist()
        except DamagedTable as error:
            sources.left_out.note(error)
            continue
        changes = sources.all_rows(CHANGES, **keys)
        worded = [row for row in changes if row["gained"] or row["lost"]]
        names = storage.layers_in_order(keys["model"], (row["layer"] for row in worded))
        href = f"differences/{slug(json.dumps([keys['labeler'], keys['model'], keys['other']]))}/"
        pair = {
            **keys,
            "href": href,
            "words": words[:_WORDS_LISTED],
            "all_words": len(words),
            "first_words": words[:_WORDS_SHOWN],
            "changed": len(changes),
            "compared": compared,
            "worded": len(worded),
            "layers": names,
        }
        sides = [[(layer := shown.get((keys[name], of))) and layer.href for of in names] for name in ("model", "other")]
        place = {name: number for number, name in enumerate(names)}
        write_script(
            out / href / "changes.js",
            "milan.changes",
            {
                "labeler": keys["labeler"],
                "models": [keys["model"], keys["other"]],
                "layers": names,
                "sides": sides,
                "rows": [[place[row["layer"]], *(row[name] for name in _CHANGE)] for row in worded],
            },
        )
        pages.write("difference.html", out / href / "index.html", root="../../", pair=pair)
        pairs.append(pair)
    return pairs


def provenance(sources: Sources, models: Sequence[str]) -> Row:
    """Lists the runs for these models, and the software versions they used."""
    runs = [row for row in sources.all_rows(RUNS) if row["model"] in models or not row["model"]]
    versions: dict[str, list[str]] = {}
    for row in runs:
        for name, version in json.loads(row["versions"] or "{}").items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    return {"runs": sorted(runs, key=lambda row: row["finished_at"]), "versions": versions}


def _title(table: Table, keys: dict[str, str]) -> str:
    if table is TRIALS:
        return f"{keys['decoder']} tuned by {keys['sweep']}"
    if table is SCORES:
        return keys["experiment"].rpartition(": ")[0] or keys["experiment"]
    if "experiment" in keys and "model" in keys:
        return f"{keys['experiment']}: {keys['model']}"
    return ", ".join([table.name, *keys.values()])
