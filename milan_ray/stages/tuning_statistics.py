"""Tuning how descriptions are searched: what there is to try, its scores over λ, and the choice.

Half of the annotated units choose, the others judge the choice. One search serves all λ of re-ranking, and one score
serves all λ that say the same of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.captioner.rerank import rescore
from milan_ray.errors import MilanError
from milan_ray.report.figures import files, new_figure
from milan_ray.scoring.bootstrap import difference, interval, intervals, resampling_counts
from milan_ray.scoring.evaluation import METRICS, Row, score_table, text_statistics
from milan_ray.scoring.text import BertScore, References
from milan_ray.yaml_files import is_number, known, mapping, number, share, whole, wrong

STRATEGIES = GREEDY, GREEDY_MI, BEAM, BEAM_MI, RERANK = ("greedy", "greedy-mi", "beam", "beam-mi", "rerank")
"""With -mi, log p(d|E) − λ log p(d) is what is searched for; "rerank" searches for log p(d|E) and subtracts then."""

DESCRIBED = (GREEDY, BEAM, RERANK)
"""What the job that describes can do: it never searches by mutual information."""

SPLITS = VALIDATION, HELD_OUT = ("validation", "held-out")


@dataclass(frozen=True)
class Sweep:
    """What to try, and how to choose.

    Attributes:
        beam_sizes: Widths of the beam, for the strategies that have one.
        lams: λ, for the strategies that have one.
        strategies: Of :data:`STRATEGIES`.
        lengths: Most tokens, ``<stop>`` included.
        metric: The measure that chooses, of :data:`~milan_ray.scoring.evaluation.METRICS`.
        validation: Share of the annotated units that choose; the others judge the choice.
        seed: Seed of that split and of the bootstrap.
        samples: Bootstrap resamples.
    """

    beam_sizes: tuple[int, ...]
    lams: tuple[float, ...]
    strategies: tuple[str, ...] = (BEAM, RERANK)
    lengths: tuple[int, ...] = (15,)
    metric: str = "bertscore-f"
    validation: float = 0.5
    seed: int = 0
    samples: int = 1000

    def trials(self) -> list[Trial]:
        """The searches to make; what needs the same search is one of them."""
        found = []
        positive = tuple(lam for lam in self.lams if lam > 0)
        for length in self.lengths:
            if GREEDY in self.strategies:
                found.append(Trial(GREEDY, None, length, (0.0,)))
            if GREEDY_MI in self.strategies:
                found += [Trial(GREEDY_MI, None, length, (lam,)) for lam in positive]
            for beam_size in self.beam_sizes:
                lams = (0.0,) * (BEAM in self.strategies) + self.lams * (RERANK in self.strategies)
                if lams:
                    found.append(Trial(RERANK, beam_size, length, tuple(sorted(set(lams)))))
                if BEAM_MI in self.strategies:
                    found += [Trial(BEAM_MI, beam_size, length, (lam,)) for lam in positive]
        return found


@dataclass(frozen=True)
class Trial:
    """One search, and all λ that its candidates are rescored with.

    Attributes:
        strategy: Of :data:`STRATEGIES`; "beam" is "rerank" with λ = 0.
        beam_size: Width of the beam; None for greedy decoding.
        length: Most tokens.
        lams: λ; where it changes the search, a single one.
    """

    strategy: str
    beam_size: int | None
    length: int
    lams: tuple[float, ...]

    @property
    def name(self) -> str:
        """A file name."""
        beam = "" if self.beam_size is None else f"-beam{self.beam_size}"
        lam = f"-lam{self.lams[0]:g}" if self.strategy in (GREEDY_MI, BEAM_MI) else ""
        return f"{self.strategy}{beam}-length{self.length}{lam}"

    def strategy_at(self, lam: float) -> str:
        """What doing this with one of its λ is called."""
        return BEAM if self.strategy == RERANK and lam == 0 else self.strategy


@dataclass(frozen=True)
class Setting:
    """How to search descriptions: what tuning chooses and describing takes.

    Attributes:
        beam_size: Width of the beam; 1 is greedy decoding.
        length: Most tokens, ``<stop>`` included.
        lam: λ; 0 ranks by log p(d|E) alone.
    """

    beam_size: int
    length: int
    lam: float


# -- files that people write ------------------------------------------------------------------------------------------


def read_sweep(text: str, where: str) -> Sweep:
    """Reads a search space.

    Args:
        text: YAML with the fields of :class:`Sweep`; numbers as a list, or as ``{from: 0, to: 1, step: 0.05}``, both
            ends included.
        where: Name of the file, for errors.

    Raises:
        MilanError: It is no YAML, or a key or value is not what it should be.
    """
    given = mapping(text, where, Sweep)
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("beam_sizes", "lengths", "lams"):
            read[key] = _numbers(value, key, where)
        elif key == "strategies":
            if not isinstance(value, list) or not value:
                raise wrong(where, key, value, f"a list of {', '.join(STRATEGIES)}")
            read[key] = tuple(known(f"strategy in {where}:", name, STRATEGIES) for name in value)
        elif key == "metric":
            read[key] = known(f"metric in {where}:", value, METRICS)
        elif key == "validation":
            read[key] = share(value, key, where)
        else:
            read[key] = whole(value, key, where, 0 if key == "seed" else 1)
    return Sweep(**read)


def read_setting(text: str, where: str) -> Setting:
    """Reads a setting; arguments and errors as :func:`read_sweep`."""
    given = mapping(text, where, Setting)
    beam_size, length = (whole(given[key], key, where) for key in ("beam_size", "length"))
    return Setting(beam_size, length, number(given["lam"], "lam", where))


def _numbers(value: object, key: str, where: str) -> tuple[Any, ...]:
    integral = key != "lams"
    wanted = f"a list of {'whole numbers from 1' if integral else 'numbers from 0'}, or {{from: …, to: …, step: …}}"
    numbers: Sequence[Any] = value if isinstance(value, list) else []
    if isinstance(value, dict) and set(value) == {"from", "to", "step"} and all(map(is_number, value.values())):
        first, last, step = value["from"], value["to"], value["step"]
        if step > 0:
            # Rounded, because 0.05 + 2 · 0.05 is not 0.15.
            numbers = [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-6) + 1)]
    integers = all(isinstance(number, int) for number in numbers)
    good = all(is_number(number) and number >= (1 if integral else 0) for number in numbers)
    if not numbers or not good or (integral and not integers):
        raise wrong(where, key, value, wanted)
    return tuple(sorted({int(number) if integral else float(number) for number in numbers}))


# -- scores -----------------------------------------------------------------------------------------------------------


def split_units(units: int, sweep: Sweep) -> dict[str, np.ndarray]:
    """Which units choose and which judge: split → ascending places among all units.

    Raises:
        MilanError: There are not enough units for both.
    """
    chosen = round(sweep.validation * units)
    if not 0 < chosen < units:
        raise MilanError(
            f"{units} annotated units cannot be split by validation = {sweep.validation:g}: both parts need one; "
            "annotate more units, or change the share."
        )
    order = np.random.default_rng(sweep.seed).permutation(units)
    return {VALIDATION: np.sort(order[:chosen]), HELD_OUT: np.sort(order[chosen:])}


def rescored(
    texts: Sequence[Sequence[str]], logp_d_given_e: np.ndarray, logp_d: np.ndarray | None, lams: Sequence[float]
) -> list[list[str]]:
    """The best description of every unit for every λ.

    Args:
        texts: Candidates, [unit][beam].
        logp_d_given_e: Nats, (N, beam).
        logp_d: Nats, (N, beam); None will do for λ = 0 alone.
        lams: L values of λ.

    Returns:
        [λ][unit]; of equal candidates the first, as :mod:`milan_ray.stages.descriptions` chooses.
    """
    found = []
    for lam in lams:
        scores = logp_d_given_e if logp_d is None else rescore(logp_d_given_e, logp_d, lam)
        found.append([beams[best] for beams, best in zip(texts, scores.argmax(axis=1), strict=True)])
    return found


def trial_scores(
    said: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    splits: Mapping[str, np.ndarray],
    bert_score: BertScore | None,
    samples: int,
    seed: int,
) -> pl.DataFrame:
    """Scores what was said with L settings of N units; each distinct description of a unit is scored once.

    Args:
        said: Descriptions, [setting][unit].
        references: Per unit its annotations.
        splits: Name → places of its units.
        bert_score: The scorer; None leaves BERTScore out.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Columns setting (its place), split, metric, value, low, high, n.
    """
    rows, texts, answers = _distinct(said, references)
    counts = {split: resampling_counts(len(units), samples, seed) for split, units in splits.items()}
    # Settings that say the same of all units, as λ in a small interval do, are one.
    distinct = {split: np.unique(rows[:, units], axis=0, return_inverse=True) for split, units in splits.items()}
    found = []
    for metric, statistics, measure in text_statistics(texts, answers, references, bert_score):
        for split, units in splits.items():
            of_settings, place = distinct[split]
            scores = intervals(statistics[of_settings], measure, counts[split])[place.ravel()].tolist()
            found += [(setting, split, metric, *score, len(units)) for setting, score in enumerate(scores)]
    names = ["setting", "split", "metric", "value", "low", "high", "n"]
    return pl.DataFrame(found, schema=names, orient="row")


class RememberingBertScore(BertScore):
    """BERTScore that scores no description of a unit twice: searches with other beams find many of the same."""

    def __call__(
        self, predictions: Sequence[str], references: References, idf_references: Sequence[str] | None = None
    ) -> np.ndarray:
        """As :class:`~milan_ray.scoring.text.BertScore`; forgets all when ``idf_references`` are others than before."""
        if idf_references is None:  # the weights are those of this very call
            return super().__call__(predictions, references)
        if tuple(idf_references) != self._weighed_by:
            self._known, self._weighed_by = {}, tuple(idf_references)
        pairs = [
            (text, (group,) if isinstance(group, str) else tuple(group))
            for text, group in zip(predictions, references, strict=True)
        ]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if new:
            texts, answers = zip(*new, strict=True)
            self._known.update(zip(new, super().__call__(texts, answers, idf_references), strict=True))
        return np.array([self._known[pair] for pair in pairs]).reshape(-1, 3)

    _known: dict[tuple[str, tuple[str, ...]], np.ndarray]
    _weighed_by: tuple[str, ...] | None = None


def _distinct(
    said: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[np.ndarray, list[str], list[Sequence[str]]]:
    """The distinct descriptions of each unit: where each setting's are (L, N), their texts, their annotations."""
    place: dict[tuple[int, str], int] = {}
    rows = np.array([[place.setdefault(pair, len(place)) for pair in enumerate(texts)] for texts in said])
    return rows, [text for _, text in place], [references[unit] for unit, _ in place]


def best_trial(trials: pl.DataFrame, metric: str, strategies: Sequence[str] = DESCRIBED) -> dict[str, Any]:
    """The row of a table of trials with the highest score on the validation units.

    Among equals the narrowest beam, then the shortest length, then the smallest λ.

    Args:
        trials: Columns of :data:`~milan_ray.schema.TRIALS`.
        metric: The measure that chooses.
        strategies: What may be chosen.

    Raises:
        MilanError: There is none to choose from.
    """
    rows = trials.filter(
        pl.col("split") == VALIDATION, pl.col("metric") == metric, pl.col("strategy").is_in(list(strategies))
    )
    if rows.is_empty():
        raise MilanError(f"nothing was tried that can be described with; add one of {', '.join(DESCRIBED)}.")
    order = ["value", "beam_size", "length", "lam"]
    return rows.sort(order, descending=[True, False, False, False], nulls_last=False).row(0, named=True)


def compare_systems(
    experiment: str,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    units: np.ndarray,
    bert_score: BertScore | None,
    samples: int,
    seed: int,
) -> pa.Table:
    """Scores systems on the same units, and how far the first is above each of the others.

    Args:
        experiment: Name of the evaluation.
        systems: System → description of each of N units.
        references: Per unit its annotations.
        units: Places of the units that count.
        bert_score: The scorer; None leaves BERTScore out.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        A table of schema SCORES; differences have paired intervals.
    """
    n = len(units)
    counts = resampling_counts(n, samples, seed)
    first, *others = systems
    places, texts, answers = _distinct(list(systems.values()), references)
    note = f"paired difference; above 0: {first} is better"
    rows: list[Row] = []
    for metric, statistics, measure in text_statistics(texts, answers, references, bert_score):
        of = dict(zip(systems, statistics[places[:, units]], strict=True))
        rows += [(name, metric, interval(of[name], measure, counts), n, "on units that chose nothing") for name in of]
        rows += [
            (f"{first} − {other}", metric, difference(of[first], of[other], measure, counts), n, note)
            for other in others
        ]
    return score_table(experiment, rows)


# -- figure -----------------------------------------------------------------------------------------------------------


def plot_trials(trials: pl.DataFrame, metric: str, chosen: Mapping[str, Any]) -> bytes:
    """The figure of a sweep: score on the validation units over λ, a line per beam size, as SVG.

    Args:
        trials: Columns of :data:`~milan_ray.schema.TRIALS`.
        metric: What to show.
        chosen: The row that was chosen; only trials of its length are shown, and its line has its 95 % intervals.
    """
    import matplotlib  # takes a second, and nothing else here needs it

    rows = trials.filter(
        pl.col("split") == VALIDATION, pl.col("metric") == metric, pl.col("length") == chosen["length"]
    )
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    beams = sorted(rows["beam_size"].drop_nulls().unique())
    for beam_size in beams:
        colour = colours(beams.index(beam_size) / max(1, len(beams) - 1) * 0.9)
        of_beam = rows.filter(pl.col("beam_size") == beam_size).sort("lam")
        for strategies, style in (((BEAM, RERANK), "-"), ((BEAM_MI,), "--")):
            line = of_beam.filter(pl.col("strategy").is_in(list(strategies)))
            if not line.is_empty():
                label = f"beam {beam_size}" + (", MI in the search" if strategies == (BEAM_MI,) else "")
                axes.plot(line["lam"], line["value"], style, color=colour, label=label, marker=".", markersize=3)
                if beam_size == chosen["beam_size"] and chosen["strategy"] in strategies:
                    axes.fill_between(line["lam"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
    for strategy, style in ((GREEDY, "x"), (GREEDY_MI, ":")):
        line = rows.filter(pl.col("strategy") == strategy).sort("lam")
        if not line.is_empty():
            axes.plot(line["lam"], line["value"], style, color="black", label=strategy)
    axes.plot(chosen["lam"], chosen["value"], "o", markersize=10, fillstyle="none", color="crimson", label="chosen")
    axes.set_xlabel("λ")
    axes.set_ylabel(f"{metric} on {chosen['n']} validation units")
    axes.legend(fontsize="small", ncols=2)
    return files(figure)["svg"]
