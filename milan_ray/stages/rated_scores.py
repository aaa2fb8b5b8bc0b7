"""Scores of descriptions from people's ratings: answers ─► ratings; ratings + rating_draws ─► rated_scores."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.annotations.rating_tasks import RatingAnswer, read_ratings
from milan_ray.config import Fingerprint, Resources
from milan_ray.engine.stage import Known, Output, TaskStage, run_stage
from milan_ray.errors import MilanError
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.schema import RATED_SCORES, RATING_DRAWS, RATINGS
from milan_ray.scoring.rated_scores import METRICS, estimate
from milan_ray.scoring.raters import Posterior, Ratings, sample_posterior
from milan_ray.stages.annotations_collect import annotator
from milan_ray.storage import Storage

KERNEL_VERSION = "rated-scores-1"

FEWEST = 20
"""Fewest draws with ratings of a unit that is scored."""

DRAWS_KEY = "milan_ray.draws"
"""Entry of the metadata of ratings: JSON, configuration hash of the draws of each layer."""

SEED = 0
"""Seed of the posterior's samples and of the resampled draws."""

_LAYER = ("labeler", "model", "layer")


@dataclass(frozen=True)
class Imported:
    """Ratings that were imported, and counts of those left out.

    Attributes:
        ratings: Answers that count.
        rejected: Answers left out because they were rejected, or skipped.
        unqualified: Answers left out because their worker did not pass the qualification test.
        repeated: Second answers of a worker to the same task, left out.
    """

    ratings: int
    rejected: int
    unqualified: int
    repeated: int


def run_ratings(
    storage: Storage,
    files: Sequence[Path],
    source: str,
    *,
    keep_rejected: bool = False,
    qualified: set[str] | None = None,
) -> Imported:
    """Imports people's ratings into the table ``ratings`` and computes scores from them, table ``rated_scores``.

    Give all files of a source at once: what it had is replaced. Workers are told apart by hashes of their names.

    Args:
        storage: The run directory, which holds the draws.
        files: Answers of either platform (:func:`~milan_ray.annotations.rating_tasks.read_ratings`).
        source: What the source is to be called.
        keep_rejected: Keep what was rejected.
        qualified: Only answers of these workers; None for all.

    Raises:
        MilanError: A file is damaged, holds no answer, or speaks of other draws than those that are there.
    """
    checked_name("a source of annotations", source, slashes=True)
    answers: list[RatingAnswer] = []
    rejected = 0
    for file in files:
        accepted, refused = read_ratings(file, keep_rejected=keep_rejected)
        answers += accepted
        rejected += refused
    of_qualified = [each for each in answers if qualified is None or each.worker in qualified]
    kept: dict[tuple[str, str, str, int, int, str], bool] = {}
    for each in of_qualified:
        key = (each.labeler, each.model, each.layer, each.unit, each.image_id, annotator(source, each.worker))
        kept.setdefault(key, each.yes)
    if not kept:
        raise MilanError(f"no answer is left of {', '.join(map(str, files))}: nothing was written.")
    draws = _current_draws(storage, of_qualified)
    rows = [(*key, yes) for key, yes in sorted(kept.items())]
    names = [column.name for column in RATINGS.columns[1:]]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    stamp = Fingerprint.of({"kernel": KERNEL_VERSION, "draws": draws, "ratings": rows})
    if not storage.is_current(RATINGS, stamp.hash, source=source):
        table = RATINGS.table(columns, {DRAWS_KEY: json.dumps(draws)}, source=source)
        storage.write(RATINGS, table, stamp, source=source)
    run_stage(RatedScores(source), storage, Resources())
    return Imported(len(kept), rejected, len(answers) - len(of_qualified), len(of_qualified) - len(kept))


def _current_draws(storage: Storage, answers: Sequence[RatingAnswer]) -> dict[str, str]:
    """Checks that answers speak of the draws in the storage; layer, as its three keys with spaces → draws' hash.

    Raises:
        MilanError: They speak of others, or of an image that was not drawn for the unit.
    """
    draws = {}
    asked: dict[tuple[str, str, str], set[tuple[int, int]]] = defaultdict(set)
    hashes: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for each in answers:
        asked[each.labeler, each.model, each.layer].add((each.unit, each.image_id))
        hashes[each.labeler, each.model, each.layer].add(each.draws)
    for layer, pairs in sorted(asked.items()):
        keys = dict(zip(_LAYER, layer, strict=True))
        current = None if storage.metadata(RATING_DRAWS, **keys) is None else storage.config_of(RATING_DRAWS, **keys)
        drawn = set()
        if current is not None:
            table = storage.read(RATING_DRAWS, ["unit", "image_id"], **keys)
            drawn = set(zip(table["unit"].to_pylist(), table["image_id"].to_pylist(), strict=True))
        if hashes[layer] != {current} or not pairs <= drawn:
            raise MilanError(
                f"ratings of {' '.join(layer)} speak of other draws than those now in {storage.root}: import them "
                "where the tasks were made, before its draws are made anew."
            )
        draws[" ".join(layer)] = str(current)
    return draws


class RatedScores(TaskStage):
    """Scores of all descriptions that a source rates: what a rater is like is learned from all of them.

    Args:
        source: The source.
    """

    table, name, recorded = RATED_SCORES, "rated_scores", True

    def __init__(self, source: str) -> None:
        self._source = source
        self.title = f"scores by ratings of {source}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """One table."""
        ratings = known.config(RATINGS, source=self._source)
        yield Output(
            {"source": self._source}, Fingerprint.of({"kernel": KERNEL_VERSION, "ratings": ratings}), about=self._source
        )

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Samples what the ratings leave open, then scores each unit."""
        ratings = pl.DataFrame(pl.from_arrow(storage.read(RATINGS, source=self._source)))
        tables = [
            storage.read(RATING_DRAWS, **dict(zip(_LAYER, keys, strict=True)))
            for keys in ratings.select(_LAYER).unique(maintain_order=True).iter_rows()
        ]
        rated = _Rated.of(pa.concat_tables(tables), ratings)
        rng = np.random.default_rng(SEED)
        posterior = sample_posterior(rated.ratings, rated.prior, rated.unit, len(rated.raters), rng)
        rows = [row for unit in range(len(rated.keys)) for row in _unit_rows(rated, unit, posterior)]
        if not rows:
            raise MilanError(f"no unit has {FEWEST} draws that somebody rated: wait for more answers.")
        rates = zip(
            rated.raters, posterior.sensitivity.mean(0).tolist(), posterior.specificity.mean(0).tolist(), strict=True
        )
        meta = {"raters": json.dumps({name: [round(value, 4) for value in each] for name, *each in rates})}
        return RATED_SCORES.table(output.columns(pa.Table.from_pylist(rows)), meta)


@dataclass(frozen=True)
class _Rated:
    """Draws that somebody rated, and the ratings as the model takes them.

    Attributes:
        draws: The draws, as rows of table ``rating_draws``.
        keys: Labeler, model, layer, unit and description of each unit.
        of_draw: Unit of each draw, as a place in ``keys``.
        item: Item of each draw: an image of a unit.
        unit: Unit of each item.
        prior: Features of each item.
        raters: Names.
        ratings: The answers.
    """

    draws: pl.DataFrame
    keys: list[tuple[str, str, str, int, str]]
    of_draw: np.ndarray
    item: np.ndarray
    unit: np.ndarray
    prior: np.ndarray
    raters: list[str]
    ratings: Ratings

    @classmethod
    def of(cls, table: pa.Table, ratings: pl.DataFrame) -> _Rated:
        """Matches draws and ratings."""
        image, unit = [*_LAYER, "unit", "image_id"], [*_LAYER, "unit", "description"]
        every = pl.DataFrame(pl.from_arrow(table)).sort(image, maintain_order=True)
        draws = every.join(ratings.select(image).unique(), on=image, how="semi", maintain_order="left")
        items = draws.select(*unit, "image_id").unique(maintain_order=True).with_row_index("item")
        units = items.select(unit).unique(maintain_order=True).with_row_index("place")
        place = items.join(units, on=unit, how="left", maintain_order="left")["place"].to_numpy()
        of_draw = draws.join(items, on=[*unit, "image_id"], how="left", maintain_order="left")["item"].to_numpy()
        answers = ratings.join(items, on=image, how="left", maintain_order="left")
        names = sorted(ratings["rater"].unique().to_list())
        number = {name: place for place, name in enumerate(names)}
        first = np.unique(of_draw, return_index=True)[1]
        prior = _rectangular(draws["prior"].gather(first))
        return cls(
            draws, list(units.select(unit).iter_rows()), place[of_draw], of_draw.astype(np.int64),
            place.astype(np.int64), prior, names,
            Ratings(
                answers["item"].to_numpy().astype(np.int64),
                np.array([number[name] for name in answers["rater"]], np.int64),
                answers["yes"].to_numpy(),
            ),
        )  # fmt: skip


def _rectangular(lists: pl.Series) -> np.ndarray:
    """Lists as rows (n, K); short ones get zeros, because layers drawn without a judge have fewer features."""
    width = int(np.max(lists.list.len().to_numpy(), initial=0))
    rows = np.zeros((len(lists), width))
    for row, values in zip(rows, lists.to_list(), strict=True):
        row[: len(values)] = values
    return rows


def _unit_rows(rated: _Rated, unit: int, posterior: Posterior) -> list[dict[str, object]]:
    """The scores of one unit; none where too few of its draws were rated."""
    chosen = np.flatnonzero(rated.of_draw == unit)
    labeler, model, layer, number, text = rated.keys[unit]
    if len(chosen) < FEWEST:
        say(f"{model} {layer} {number} is left out: {len(chosen)} of its draws were rated, and {FEWEST} are needed")
        return []
    draws, items = rated.draws[chosen], rated.item[chosen]
    intervals = estimate(
        draws["weight"].to_numpy(),
        _rectangular(draws["calibration"]),
        draws["activation"].to_numpy(),
        draws["top"].to_numpy(),
        posterior.presence[:, items],
        posterior.shown[:, items],
        np.random.default_rng([SEED, unit]),
    )
    about: dict[str, object] = {
        "labeler": labeler, "model": model, "layer": layer, "unit": number, "description": text,
        "draws": len(chosen), "images": len(np.unique(items)),
        "ratings": int(np.isin(rated.ratings.item, items).sum()),
    }  # fmt: skip
    return [
        about | {"metric": metric, "value": each.value, "low": each.low, "high": each.high}
        for metric, each in zip(METRICS, intervals, strict=True)
    ]


def ratings_report(storage: Storage, source: str, imported: Imported) -> str:
    """Formats what was imported, mean scores by layer, and what raters are like, the least reliable first."""
    scores = pl.DataFrame(pl.from_arrow(storage.read(RATED_SCORES, source=source)))
    lines = [
        f"left out: {imported.rejected} rejected or skipped, {imported.unqualified} of workers who did not pass the "
        f"test, {imported.repeated} repeated",
        f"{imported.ratings} ratings of source {source}; means over units, mean width of the 95 % intervals:",
    ]
    width = (pl.col("high") - pl.col("low")).mean().alias("width")
    means = scores.group_by([*_LAYER, "metric"], maintain_order=True).agg(pl.col("value").mean(), width, pl.len())
    for labeler, model, layer, metric, value, wide, units in means.iter_rows():
        lines.append(f"  {labeler} {model} {layer}  {metric:12} {value:.3f}  ±{wide / 2:.3f} over {units} units")
    meta = storage.metadata(RATED_SCORES, source=source) or {}
    lines.append("by rater, the least reliable first: sensitivity, specificity")
    for name, (true, false) in sorted(json.loads(meta["raters"]).items(), key=lambda each: sum(each[1])):
        lines.append(f"  {name:28} {true:.2f} {false:.2f}")
    return "\n".join(lines)
