"""Auditing networks trained on blurred images: units that still respond to what was blurred (paper, Section 6)."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import polars as pl

from milan_ray.errors import MilanError, unknown_name
from milan_ray.schema.audits import ACCEPT, REJECT
from milan_ray.scoring.bootstrap import Interval, difference, interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import Row, unit_values
from milan_ray.scoring.paired import sign, signed_rank
from milan_ray.scoring.words import asked_in
from milan_ray.textfiles import clean, csv_in, delimiter, dict_reader

FACE_WORDS = ("face", "head", "nose", "eyes", "mouth")
"""Words in descriptions of units that respond to faces, the paper's; all forms of a word count."""

SUFFIX = "-blurred"
"""Suffix of the name of a network that was trained on blurred images; its twin has the name without the suffix."""

PLAIN, BLURRED = "unblurred", "blurred"
"""The sides of a pair."""

REVIEW_COLUMNS = ("model", "layer", "unit", "description", "verdict", "note", "card", "exemplars")
"""Columns of the review file."""

_KEY = ("model", "layer", "unit", "description", "exemplars")

Pair = tuple[str, str]
"""A network trained on images as they are, and the same trained on blurred ones."""


def pair_models(names: Collection[str], suffix: str = SUFFIX, patterns: Sequence[str] | None = None) -> list[Pair]:
    """Finds the pairs among networks: two names that differ by a suffix.

    Args:
        names: Networks that are described.
        suffix: Suffix of the second name, e.g. ``resnet18/imagenet`` and ``resnet18/imagenet-blurred``.
        patterns: Only pairs with a name that matches one of these patterns (``resnet*``), with or without its part up
            to the first slash; None for all pairs.

    Returns:
        The pairs, sorted.

    Raises:
        MilanError: There are none, or a pattern matches no network.
    """
    known = sorted(set(names))

    def chosen(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[2], pattern)

    for pattern in patterns or ():
        if not any(chosen(name, pattern) for name in known):
            raise unknown_name("model with descriptions", pattern, known)
    wanted = {name for name in known if patterns is None or any(chosen(name, pattern) for pattern in patterns)}
    pairs = [(name, f"{name}{suffix}") for name in known if f"{name}{suffix}" in known]
    pairs = [pair for pair in pairs if wanted & set(pair)]
    if not pairs:
        raise MilanError(
            f"no two of the described networks are called NAME and NAME{suffix}: there are "
            f"{', '.join(sorted(wanted)) or 'none'}; describe both, give another --suffix, or name pairs with --pair."
        )
    return pairs


def find_units(descriptions: pl.DataFrame, words: Sequence[str]) -> pl.DataFrame:
    """The units whose descriptions have one of some words, in any form.

    Args:
        descriptions: A column ``description`` and any others.
        words: See :func:`~milan_ray.scoring.words.asked_in`.

    Returns:
        Their rows, with a column ``words`` of the words that occur.
    """
    texts = descriptions.select("description").unique().sort("description")
    texts = texts.with_columns(asked_in(texts["description"], words))
    units = descriptions.join(texts, on="description", how="left", maintain_order="left")
    return units.filter(pl.col("words").list.len() > 0)


def read_review(text: str, where: str) -> pl.DataFrame:
    """Reads a review file.

    Args:
        text: The file.
        where: Its name, for errors.

    Returns:
        :data:`REVIEW_COLUMNS`, strings but for the unit; verdicts in lower case.

    Raises:
        MilanError: A column is missing, a verdict or unit is invalid, or a unit has two verdicts.
    """
    with csv_in(where):
        reader = dict_reader(text)
        lines = [(row, reader.line_num) for row in reader]
    missing = [name for name in REVIEW_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise MilanError(f"{where} has no column {', '.join(missing)}: keep the header, and commas between columns.")
    rows = []
    for row, number in lines:
        verdict, unit = (row["verdict"] or "").strip().lower(), (row["unit"] or "").strip()
        if verdict not in ("", ACCEPT, REJECT) or not unit.isdecimal():
            raise MilanError(
                f"{where}, line {number}: unit {unit!r} with verdict {verdict!r}: the unit must be a number, "
                f"the verdict {ACCEPT}, {REJECT} or empty."
            )
        cells = {name: row[name] or "" for name in REVIEW_COLUMNS}
        names = {name: clean(cells[name]) for name in ("model", "layer")}
        rows.append({**cells, **names, "unit": int(unit), "verdict": verdict})
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(REVIEW_COLUMNS, pl.String)
    frame = pl.DataFrame(rows, {**schema, "unit": pl.Int64})
    twice = frame.group_by(_KEY).agg(pl.col("verdict").n_unique().alias("verdicts")).filter(pl.col("verdicts") > 1)
    if len(twice):
        model, layer, unit, *_ = twice.row(0)
        raise MilanError(f"{where} has different verdicts on {model} {layer} {unit}: leave one.")
    return frame.unique(_KEY, keep="first", maintain_order=True)


def write_review(new: pl.DataFrame, text: str | None = None) -> str:
    """Adds lines to a review file, which otherwise stays as it is, with any columns that people have added.

    Args:
        new: Rows with :data:`REVIEW_COLUMNS`.
        text: The existing file; None if there is none yet.
    """
    end = "\r\n" if text and "\r\n" in text else "\n"
    buffer = io.StringIO(newline="")
    between = ","
    if text is None:
        header = list(REVIEW_COLUMNS)
        csv.writer(buffer, lineterminator=end).writerow(header)
    else:
        buffer.write(text if text.endswith("\n") else text + end)
        between = delimiter(text)
        with csv_in("the review"):
            header = list(dict_reader(text).fieldnames or ())
    writer = csv.DictWriter(buffer, header, restval="", lineterminator=end, delimiter=between)
    writer.writerows(new.select(REVIEW_COLUMNS).iter_rows(named=True))
    return buffer.getvalue()


def reviewed(units: pl.DataFrame, earlier: pl.DataFrame | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Joins units and people's verdicts.

    A verdict holds for a description and the exemplars that were shown with it. If either changed, the unit has to be
    reviewed again; the old line stays in the file.

    Args:
        units: Columns model, layer, unit, description, exemplars, card and any others.
        earlier: From :func:`read_review`; None if there is no file yet.

    Returns:
        The units with columns verdict and note; and the units that are not in the review file.
    """
    if earlier is None:
        earlier = read_review(",".join(REVIEW_COLUMNS), "")
    units = units.with_columns(pl.col("unit").cast(pl.Int64))
    verdicts = earlier.select(*_KEY, "verdict", "note")
    units = units.join(verdicts, on=_KEY, how="left", maintain_order="left")
    units = units.with_columns(pl.col("verdict", "note").fill_null(""))
    return units, units.join(earlier, on=_KEY, how="anti", maintain_order="left").select(REVIEW_COLUMNS)


def count_pairs(pairs: Sequence[Pair], units: pl.DataFrame, sizes: dict[str, int]) -> pl.DataFrame:
    """Counts, per pair, the units found, except rejected ones.

    Args:
        pairs: The pairs.
        units: Columns model and verdict, a row per unit found.
        sizes: Network → described units.

    Returns:
        Columns model, other, and for each of them units, of, rejected, unreviewed (``other_…`` for the second).
    """
    verdict = pl.col("verdict")
    counts = units.group_by("model").agg(
        units=(verdict != REJECT).sum(), rejected=(verdict == REJECT).sum(), unreviewed=(verdict == "").sum()
    )
    counts = counts.with_columns(pl.exclude("model").cast(pl.Int64))
    columns = ("units", "of", "rejected", "unreviewed")
    described = pl.DataFrame(list(sizes.items()), {"model": pl.String, "of": pl.Int64}, orient="row")
    sides = described.join(counts, on="model", how="left").select("model", *columns).fill_null(0)
    others = sides.rename({name: f"other_{name}" for name in columns} | {"model": "other"})
    table = pl.DataFrame(list(pairs), {"model": pl.String, "other": pl.String}, orient="row")
    return table.join(sides, on="model", maintain_order="left").join(others, on="other", maintain_order="left")


def compare_sides(pairs: pl.DataFrame, samples: int = 10_000, seed: int = 0) -> list[Row]:
    """Compares both sides of the pairs: paired tests, and bootstrap over pairs.

    Args:
        pairs: From :func:`count_pairs`.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows of :func:`~milan_ray.scoring.evaluation.score_table`: units per network and share of units, of both
        sides and their difference; p of Wilcoxon's signed-rank and of the sign test.
    """
    counts = resampling_counts(len(pairs), samples, seed)
    gap, paired = f"{PLAIN} − {BLURRED}", "paired difference, resampled over pairs of networks"
    numbers = (unit_values(pairs[name].to_numpy()) for name in ("units", "other_units"))
    shares = (pairs.select(*names).to_numpy().astype(float) for names in (("of", "units"), ("other_of", "other_units")))
    reading = "units found and not rejected, "
    rows = side_rows("units per network", f"{reading}mean over networks", paired, numbers, counts)
    rows += side_rows("share of units", f"{reading}of all described ones", paired, shares, counts)
    differences = (pairs["units"] - pairs["other_units"]).to_list()
    for metric, p in (("p (signed ranks)", signed_rank(differences)), ("p (signs)", sign(differences))):
        note = f"two-sided, exact, over pairs; with {len(pairs)} pairs it cannot fall below {2 ** (1 - len(pairs)):.2g}"
        rows.append((gap, metric, Interval(p, float("nan"), float("nan")), len(pairs), note))
    return rows


def side_rows(
    metric: str, reading: str, gap_reading: str, sides: Iterable[np.ndarray], counts: np.ndarray
) -> list[Row]:
    """A measure of both sides and its difference, as rows of scores.

    Args:
        metric: Name of the measure.
        reading: Note of the sides.
        gap_reading: Note of the difference.
        sides: Counts and totals of unblurred networks, (N, 2), and of their twins.
        counts: (B, N) from :func:`~milan_ray.scoring.bootstrap.resampling_counts`.
    """
    plain, blurred = sides
    n = counts.shape[1]
    return [
        (PLAIN, metric, interval(plain, ratio, counts), n, reading),
        (BLURRED, metric, interval(blurred, ratio, counts), n, reading),
        (f"{PLAIN} − {BLURRED}", metric, difference(plain, blurred, ratio, counts), n, gap_reading),
    ]


def summary(pairs: pl.DataFrame, rows: Sequence[Row]) -> str:
    """The audit on one screen."""
    widest = max(len(name) for name in pairs["model"])
    lines = [
        f"  {row['model']:{widest}} {row['units']:>5} of {row['of']:,} units; {BLURRED} {row['other_units']:>5} of "
        f"{row['other_of']:,}"
        for row in pairs.iter_rows(named=True)
    ]
    sums = pairs.select(pl.exclude("model", "other", "audit", "images").sum()).row(0, named=True)
    scores = {(system, metric): value for system, metric, value, *_ in rows}
    gap = scores[f"{PLAIN} − {BLURRED}", "units per network"]
    p = scores[f"{PLAIN} − {BLURRED}", "p (signed ranks)"].value
    return "\n".join(
        [
            *lines,
            f"{sums['units']} units in {len(pairs)} {PLAIN} networks, {sums['other_units']} in {len(pairs)} {BLURRED} "
            f"ones; per pair {gap.value:.1f} fewer [{gap.low:.1f}, {gap.high:.1f}], p = {p:.2g} (signed ranks)",
            f"rejected on inspection: {sums['rejected'] + sums['other_rejected']}; not looked at yet, and counted: "
            f"{sums['unreviewed'] + sums['other_unreviewed']}",
        ]
    )
