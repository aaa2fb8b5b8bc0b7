"""Writes the report: an overview, a page per model, layer and pair of compared networks, and the data they show.

The report consists of plain files that open from disk: it needs no server and makes no requests. `file://` allows a
page to load only scripts and images, so all data are scripts. Layers are written one by one, their cards page by page
and their masks row group by row group. Memory use therefore depends on the widest layer, not on the number of units.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from milan_ray.damaged import LeftOut
from milan_ray.errors import DamagedTable, MilanError, unknown_name
from milan_ray.report.audits import audits
from milan_ray.report.images import write_images, write_names
from milan_ray.report.layers import PAGE_SIZE, LayerSummary, Sources, layer_folder, write_layer
from milan_ray.report.pages import ASSETS, TEMPLATES, Pages, Row, slug
from milan_ray.report.said import what_is_said
from milan_ray.report.sections import differences, evaluations, figures, provenance, skipped
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, SCORES
from milan_ray.storage import Storage, natural

PAPER = "paper/index.html"
"""The page of `jobs.paper`, relative to the report's folder; the overview links to it if it exists."""

_SKIPPED_LISTED = 100
_LAYERS_WITH_EXAMPLES = 100  # with more layers, only the models' pages show examples

Progress = Callable[[int, int, str], None]


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

    Needs exemplars and views. Also shows levels, descriptions, annotations, scores, nearest units, differences, figures
    of experiments, skipped images and runs, if they exist. Without descriptions, the report shows only exemplars. An
    existing report in the same folder is replaced, except unchanged images and masks. The overview is written last.

    Damaged tables are left out and reported: the whole layer if its exemplars are damaged, otherwise only the data of
    the table.

    Args:
        storage: The run directory.
        out_dir: Local folder for the report; made when missing.
        models: Models to show; None for all that have exemplars.
        labelers: Labelers to show, the main one (whose scores rank units) first; None for all, in alphabetical order.
        title: Heading of the overview.
        scores: Evaluation to show (schema :data:`milan_ray.schema.SCORES`); None for all in the run directory.
        notes: Remarks for the overview, heading → text.
        progress: Called before each layer and once at the end as `progress(layers done, total layers, what)`.

    Returns:
        The path of `index.html`.

    Raises:
        MilanError: There are no exemplars, or none of a given model or labeler; all of them are damaged; a view is
            missing; or the folder cannot be written.
    """
    out = Path(out_dir)
    partitions = storage.partitions(EXEMPLARS)
    if not partitions:
        raise MilanError(f"{storage.uri(EXEMPLARS.name)} holds no exemplars; run `python -m jobs.exemplars` first.")
    shown_models = _chosen("model with exemplars", models, [keys["model"] for keys in partitions])
    known_labelers = [keys["labeler"] for keys in storage.partitions(DESCRIPTIONS) if keys["model"] in shown_models]
    shown_labelers = _chosen("labeler with descriptions", labelers, known_labelers)
    layers = storage.in_model_order(keys for keys in partitions if keys["model"] in shown_models)
    layers.sort(key=lambda keys: shown_models.index(keys["model"]))
    left_out = LeftOut("report")
    sources = Sources.find(storage, shown_labelers, left_out)
    pages = Pages(labelers=shown_labelers)
    try:
        out.mkdir(parents=True, exist_ok=True)
        index = out / "index.html"
        index.unlink(missing_ok=True)  # so that an interrupted report is not mistaken for a complete one
        summaries, images = _write_layers(out, pages, sources, layers, progress)
        for (probe, view), image_ids in images.items():
            write_images(storage, out, probe, view, image_ids, left_out)
            write_names(storage, out, probe, view, image_ids, left_out)
        for asset in ASSETS:
            shutil.copyfile(TEMPLATES / asset, out / asset)
        context = {"title": title, "notes": notes or {}, "images": sum(map(len, images.values()))}
        _write_overview(out, pages, sources, summaries, scores, context)
    except OSError as error:
        raise MilanError(f"the report {out} could not be written: {error}; choose a folder that can.") from error
    if progress:
        progress(len(layers), len(layers), "report")
    return index


def _write_layers(
    out: Path, pages: Pages, sources: Sources, layers: list[dict[str, str]], progress: Progress | None
) -> tuple[list[LayerSummary], dict[tuple[str, str], set[int]]]:
    """Writes the layers' pages. Damaged layers are removed from the list, and no page refers to them.

    Returns:
        Each layer's data for the overview; (probe, view) → images shown.

    Raises:
        DamagedTable: All layers are damaged.
    """
    images: dict[tuple[str, str], set[int]] = defaultdict(set)
    summaries: list[LayerSummary] = []
    for done, keys in enumerate(layers):
        if progress:
            progress(done, len(layers), f"{keys['model']} {keys['layer']}")
        siblings = [layer_folder(**other) for other in layers if other["model"] == keys["model"]]
        try:
            summaries.append(write_layer(out, pages, sources, keys["model"], keys["layer"], siblings, images))
        except DamagedTable as error:
            layers.remove(keys)
            if not layers:
                raise
            sources.left_out.note(error)
            # Starts over, because earlier pages refer to this layer. Masks already rendered are kept.
            return _write_layers(out, pages, sources, layers, progress)
    return summaries, images


def _write_overview(
    out: Path, pages: Pages, sources: Sources, layers: Sequence[LayerSummary], scores: pa.Table | None, context: Row
) -> None:
    """Writes the models' pages and the overview; sections about a single model go to that model's page."""
    models = {model: list(of) for model, of in groupby(layers, key=lambda layer: layer.model)}
    tables = evaluations(sources.all_rows(SCORES) if scores is None else scores.to_pylist(), sources.failing)
    plots = figures(sources.storage, out)
    pairs = differences(out, pages, sources, layers)
    unusable, ran = skipped(sources, list(models)), provenance(sources, list(models))
    hrefs = {model: f"layers/{slug(model)}/index.html" for model in models}
    for model, of in models.items():
        pages.write(
            "model.html",
            out / hrefs[model],
            root="../../",
            model=model,
            layers=of,
            said=what_is_said(of),
            evaluations=[table for table in tables if table["model"] == model],
            figures=[figure for figure in plots if figure.model == model],
            differences=[pair for pair in pairs if model in (pair["model"], pair["other"])],
            skipped=[table for table in unusable if table["model"] == model],
            skipped_listed=_SKIPPED_LISTED,
            runs=[row for row in ran["runs"] if row["model"] == model],
            versions={},
        )
    columns: dict[str, str] = {}
    for layer in layers:
        columns |= layer.columns
    pages.write(
        "index.html",
        out / "index.html",
        root="",
        models=[(model, hrefs[model], of) for model, of in models.items()],
        layers=layers,
        columns=columns,
        with_examples=len(layers) <= _LAYERS_WITH_EXAMPLES,
        page_size=PAGE_SIZE,
        evaluations=[table for table in tables if table["model"] not in models],
        of_models=[(table["name"], hrefs[table["model"]]) for table in tables if table["model"] in models],
        figures=[figure for figure in plots if figure.model not in models],
        differences=pairs,
        audits=audits(out, pages, sources, layers),
        paper=PAPER if (out / PAPER).is_file() else None,
        skipped=unusable,
        skipped_listed=_SKIPPED_LISTED,
        **ran,
        **context,
    )


def _chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Returns the wanted names, all of which must be known; if None, all known names in natural order."""
    if wanted is None:
        return sorted(set(known), key=natural)
    for name in wanted:
        if name not in known:
            raise unknown_name(kind, name, set(known))
    return list(dict.fromkeys(wanted))
