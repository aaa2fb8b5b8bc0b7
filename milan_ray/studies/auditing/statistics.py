"""Auditing networks trained on anonymised images: units that still look for what was blurred out (paper, Section 6)."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
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
"""What descriptions of units that look for faces contain, the paper's; all forms of each count."""

SUFFIX = "-blurred"
"""What the name of a network has at its end when its twin is the one trained on images as they are."""

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
        suffix: What the second's name has at its end, e.g. ``resnet18/imagenet`` and ``resnet18/imagenet-blurred``.
        patterns: Only pairs of which either name matches one of these (``resnet*``), or is ``…/`` and one of them;
            None for all.

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
        Their rows, with a column ``words`` of those that occur.
    """
    texts = descriptions.select("description").unique().sort("description")
    texts = texts.with_columns(asked_in(texts["description"], words))
    found = descriptions.join(texts, on="description", how="left", maintain_order="left")
    return found.filter(pl.col("words").list.len() > 0)


def read_review(text: str, where: str) -> pl.DataFrame:
    """Reads a review file.

    Args:
        text: The file.
        where: Its name, for errors.

    Returns:
        :data:`REVIEW_COLUMNS`, strings but for the unit; verdicts in lower case.

    Raises:
        MilanError: A column is missing, a verdict or unit is none, or a unit has two verdicts.
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
    """A review file with further lines; what is there stays as it is, with any columns that people have added.

    Args:
        new: Rows with :data:`REVIEW_COLUMNS`.
        text: The file as it is; None for none yet.
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


def reviewed(found: pl.DataFrame, earlier: pl.DataFrame | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Brings units and what people said of them together.

    A verdict is about a description and the exemplars that were seen with it: where either changed, the unit has to be
    looked at again, and the old line stays for its note.

    Args:
        found: Columns model, layer, unit, description, exemplars, card and any others.
        earlier: What :func:`read_review` found; None where there is no file yet.

    Returns:
        The units with columns verdict and note; those of them that the review file lacks.
    """
    if earlier is None:
        earlier = read_review(",".join(REVIEW_COLUMNS), "")
    found = found.with_columns(pl.col("unit").cast(pl.Int64))
    verdicts = earlier.select(*_KEY, "verdict", "note")
    units = found.join(verdicts, on=_KEY, how="left", maintain_order="left")
    units = units.with_columns(pl.col("verdict", "note").fill_null(""))
    return units, units.join(earlier, on=_KEY, how="anti", maintain_order="left").select(REVIEW_COLUMNS)


def count_pairs(pairs: Sequence[Pair], units: pl.DataFrame, sizes: dict[str, int]) -> pl.DataFrame:
    """Counts, per pair, the units that were found and not rejected.

    Args:
        pairs: The pairs.
        units: Columns model and verdict, a row per unit found.
        sizes: Network → described units.

    Returns:
        Columns model, other, and for each of them units, of, rejected, unreviewed (``other_…`` for the second).
    """
    rejected, unreviewed = pl.col("verdict") == REJECT, pl.col("verdict") == ""
    counts = {
        model: {"units": counted, "rejected": out, "unreviewed": open_}
        for model, counted, out, open_ in units.group_by("model")
        .agg((~rejected).sum(), rejected.sum().alias("out"), unreviewed.sum().alias("open"))
        .iter_rows()
    }
    nothing = {"units": 0, "rejected": 0, "unreviewed": 0}
    rows = []
    for model, other in pairs:
        mine = {"of": sizes[model], **counts.get(model, nothing)}
        theirs = {"of": sizes[other], **counts.get(other, nothing)}
        rows.append({"model": model, "other": other, **mine, **{f"other_{key}": n for key, n in theirs.items()}})
    columns = ("units", "of", "rejected", "unreviewed")
    return pl.DataFrame(rows).select("model", "other", *columns, *(f"other_{name}" for name in columns))


def compare_sides(pairs: pl.DataFrame, samples: int = 10_000, seed: int = 0) -> list[Row]:
    """Whether networks trained on blurred images have fewer such units: paired tests, and bootstrap over pairs.

    Args:
        pairs: From :func:`count_pairs`.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows of :func:`~milan_ray.scoring.evaluation.score_table`: units per network and share of units, of both
        sides and their difference; p of Wilcoxon's signed-rank and of the sign test.
    """
    counts = resampling_counts(len(pairs), samples, seed)
    means = {PLAIN: unit_values(pairs["units"].to_numpy()), BLURRED: unit_values(pairs["other_units"].to_numpy())}
    shares = {
        PLAIN: pairs.select("of", "units").to_numpy().astype(np.float64),
        BLURRED: pairs.select("other_of", "other_units").to_numpy().astype(np.float64),
    }
    gap = f"{PLAIN} − {BLURRED}"
    rows: list[Row] = []
    for metric, reading, of in (
        ("units per network", "units found and not rejected, mean over networks", means),
        ("share of units", "units found and not rejected, of all described ones", shares),
    ):
        for side, statistics in of.items():
            rows.append((side, metric, interval(statistics, ratio, counts), len(pairs), reading))
        apart = difference(of[PLAIN], of[BLURRED], ratio, counts)
        rows.append((gap, metric, apart, len(pairs), "paired difference, resampled over pairs of networks"))
    differences = (pairs["units"] - pairs["other_units"]).to_list()
    for metric, p in (("p (signed ranks)", signed_rank(differences)), ("p (signs)", sign(differences))):
        note = f"two-sided, exact, over pairs; with {len(pairs)} pairs it cannot fall below {2 ** (1 - len(pairs)):.2g}"
        rows.append((gap, metric, Interval(p, float("nan"), float("nan")), len(pairs), note))
    return rows


def summary(pairs: pl.DataFrame, rows: Sequence[Row]) -> str:
    """The audit on one screen."""
    widest = max(len(name) for name in pairs["model"])
    lines = []
    for row in pairs.iter_rows(named=True):
        lines.append(
            f"  {row['model']:{widest}} {row['units']:>5} of {row['of']:,} units; {BLURRED} {row['other_units']:>5} of "
            f"{row['other_of']:,}"
        )
    total, other = pairs["units"].sum(), pairs["other_units"].sum()
    found = {(system, metric): value for system, metric, value, *_ in rows}
    gap = found[f"{PLAIN} − {BLURRED}", "units per network"]
    p = found[f"{PLAIN} − {BLURRED}", "p (signed ranks)"].value
    lines.append(
        f"{total} units in {len(pairs)} {PLAIN} networks, {other} in {len(pairs)} {BLURRED} ones; per pair "
        f"{gap.value:.1f} fewer [{gap.low:.1f}, {gap.high:.1f}], p = {p:.2g} (signed ranks)"
    )
    looked = pairs.select(pl.sum_horizontal("rejected", "other_rejected").sum()).item()
    unseen = pairs.select(pl.sum_horizontal("unreviewed", "other_unreviewed").sum()).item()
    lines.append(f"rejected on inspection: {looked}; not looked at yet, and counted: {unseen}")
    return "\n".join(lines)
