"""How well a captioner describes networks that it has not learned from: scores by layer, class names, sheets to rate.

    python examples/unseen_networks.py --model squeezenet1_0/imagenet --layers outputs features.12 --storage ~/run \
        --sheets sheets

Needs descriptions (jobs.describe). Scores (jobs.score) are shown by layer where there are some. Where a layer's units
are classes, MiniLM compares descriptions with class names. The sheets show exemplars of random units, each with two
descriptions, a and b: the unit's own and another unit's, in an order that the rater does not see. The columns of
verdicts in sheets/units.csv take right, part or wrong, and the same command then counts them. docs/photographs.md runs
it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from milan_ray.engine import references
from milan_ray.library.run_directory import RunExemplars
from milan_ray.models.registry import RANDOM
from milan_ray.models.sentences import SentenceEncoder
from milan_ray.schema import UNIT_SCORES
from milan_ray.scoring.bootstrap import resampling_counts
from milan_ray.scoring.class_names import class_name_rows, nearest_constant
from milan_ray.scoring.differences import wilson
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, Row, mean_rows, with_trivial_rows
from milan_ray.scoring.text import minilm_directory
from milan_ray.storage import Storage

VERDICTS = ("right", "part", "wrong")
COLUMNS = ("number", "model", "layer", "unit", "a", "b")
WIDTH, SHOWN, ROWS = 1200, 8, 6
"""Of a sheet: pixels, exemplars per unit, units."""

Layers = dict[tuple[str, str], pl.DataFrame]
"""(model, layer) → unit, description."""


def read_descriptions(storage: str, models: list[str], layers: list[str] | None, labeler: str) -> Layers:
    """Reads one labeler's descriptions, by layer."""
    found: Layers = {}
    for model in models:
        run = RunExemplars(Storage(storage), model)
        of_model = run.descriptions.filter(labeler=labeler)
        for layer in layers or run.layers:
            of_layer = of_model.filter(layer=layer).select("unit", "description").sort("unit")
            if len(of_layer):
                found[model, layer] = of_layer
    if not found:
        raise SystemExit(f"{storage} has no descriptions of these layers by {labeler}: run jobs.describe.")
    return found


def class_rows(texts: list[str], names: tuple[str, ...], labeler: str, folder: Path) -> list[Row]:
    """Compares descriptions of a classifier's outputs with its class names, by a sentence encoder."""
    encoder = SentenceEncoder(folder, "cpu")

    def embed(some: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = encoder.embed_texts(some).numpy()
        return vectors

    systems = with_trivial_rows({labeler: texts}, nearest_constant(texts, names, embed))
    return class_name_rows(systems, names, embed)


def scored_rows(storage: Storage, model: str, layer: str, labeler: str) -> list[tuple[str, Row]]:
    """Sums one layer's unit scores up: (judge, row)."""
    rows: list[tuple[str, Row]] = []
    for keys in storage.partitions(UNIT_SCORES, model=model, layer=layer, labeler=labeler):
        table = pl.DataFrame(pl.from_arrow(storage.read(UNIT_SCORES, **keys))).drop_nulls("value")
        for (metric,), of_metric in table.group_by("metric", maintain_order=True):
            wide = of_metric.pivot("system", index="unit", values="value").drop_nulls()
            values = {labeler: wide["own"].to_numpy()} | {name: wide[name].to_numpy() for name in (SHUFFLED, CONSTANT)}
            rows += [(keys["predictor"], row) for row in mean_rows(metric, "", values, resampling_counts(len(wide)))]
    return rows


def choose_units(described: Layers, wanted: int, seed: int) -> pl.DataFrame:
    """Draws units, as many of each layer as of the others, each with a second description, another unit's.

    Only descriptions that differ from the unit's own can be the second one. Which of both is ``a`` is random.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for place, ((model, layer), table) in enumerate(described.items()):
        share = wanted // len(described) + (place < wanted % len(described))
        for row in sorted(rng.choice(len(table), min(share, len(table)), replace=False)):
            unit, own = table.row(row)
            others = table.filter(pl.col("description") != own)["description"]
            other = others[int(rng.integers(len(others)))] if len(others) else ""
            a, b = (own, other) if rng.random() < 0.5 else (other, own)
            rows.append({"number": len(rows) + 1, "model": model, "layer": layer, "unit": unit, "a": a, "b": b})
    return pl.DataFrame(rows).with_columns(verdict_a=pl.lit(""), verdict_b=pl.lit(""))


def write_sheets(storage: str, units: pl.DataFrame, folder: Path) -> None:
    """Writes pictures of exemplars with both descriptions, some units each, and the table for verdicts."""
    strips = []
    for row in units.to_dicts():
        unit = RunExemplars(Storage(storage), row["model"]).lookup(row["layer"], row["unit"])
        grid = unit.grid(columns=SHOWN, limit=SHOWN)
        grid = grid.resize((WIDTH, round(grid.height * WIDTH / grid.width)))
        strip = Image.new("RGB", (WIDTH, grid.height + 40), "white")
        strip.paste(grid, (0, 40))
        text = f"{row['number']}   a: {row['a']}   |   b: {row['b']}"
        ImageDraw.Draw(strip).text((4, 6), text, fill="black", font_size=22)
        strips.append(strip)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(strips), ROWS):
        some = strips[start : start + ROWS]
        sheet, top = Image.new("RGB", (WIDTH, sum(strip.height for strip in some))), 0
        for strip in some:
            sheet.paste(strip, (0, top))
            top += strip.height
        sheet.save(folder / f"sheet-{start // ROWS + 1}.png")
    units.write_csv(folder / "units.csv")


def count_verdicts(rated: pl.DataFrame, described: Layers) -> dict[tuple[str, str], Counter[str]]:
    """Counts verdicts: (layer of a model or "all", "own" or "other") → verdict → count."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rated.to_dicts():
        own = described[row["model"], row["layer"]].filter(unit=row["unit"])["description"].to_list()
        if row["a"] not in own and row["b"] not in own:
            raise SystemExit(f"row {row['number']}: the unit is described differently now; draw new sheets.")
        for letter in "ab":
            if not row[letter]:
                continue  # no unit of the layer has another description
            if (verdict := row[f"verdict_{letter}"]) not in VERDICTS:
                raise SystemExit(f"row {row['number']}: verdict_{letter} is {verdict!r}, not one of {VERDICTS}.")
            whose = "own" if row[letter] in own else "other"
            for what in (f"{row['model']} {row['layer']}", "all"):
                counts.setdefault((what, whose), Counter())[verdict] += 1
    return counts


def show(title: str, rows: list[Row]) -> None:
    """Prints rows of scores with their intervals."""
    for system, metric, (value, low, high), n, _ in rows:
        print(f"{title:45} {metric:16} {system:20} {value:.3f} [{low:.3f}, {high:.3f}] n = {n}")


def main() -> None:
    """Prints scores; writes sheets, or counts the verdicts on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--layers", nargs="+")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--labeler", default="milan")
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--sheets", help="folder of the sheets")
    parser.add_argument("--units", type=int, default=30, help="units on the sheets")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of units")
    args = parser.parse_args()
    described = read_descriptions(args.storage, args.model, args.layers, args.labeler)
    folder = minilm_directory()
    for (model, layer), table in described.items():
        texts = table["description"].to_list()
        print(f"{model} {layer}: {len(set(texts))} distinct descriptions of {len(texts)} units")
        names = references.model(references.ModelRef(model, RANDOM, plugins=tuple(args.plugin))).classes
        if folder and names and len(names) == len(texts):
            show(f"{model} {layer}, MiniLM", class_rows(texts, names, args.labeler, folder))
        for judge, row in scored_rows(Storage(args.storage), model, layer, args.labeler):
            show(f"{model} {layer}, {judge}", [row])
    if args.sheets is None:
        return
    file = Path(args.sheets) / "units.csv"
    if not file.exists():
        write_sheets(args.storage, choose_units(described, args.units, args.seed), file.parent)
        print(f"{file}: fill in verdict_a and verdict_b ({', '.join(VERDICTS)}), then run this again")
        return
    rated = pl.read_csv(file, infer_schema=False).fill_null("").cast({"unit": pl.Int64})
    for (what, whose), counts in sorted(count_verdicts(rated, described).items()):
        n = counts.total()
        share, low, high = wilson(np.array(counts["right"]), n)
        figures = " ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS)
        print(f"{what:45} {whose:6} {figures} of {n}; right {share:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
