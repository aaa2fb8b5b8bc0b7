"""Tuning of decoding settings: the search space, scores over λ, and the choice.

The validation units choose a setting; the held-out units score the chosen one. Candidates of one search are re-ranked
with every λ, and each distinct description of a unit is scored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.captioner.rerank import complete, contrast, rescore
from milan_ray.captioner.text import readable
from milan_ray.errors import MilanError
from milan_ray.scoring.bootstrap import difference, interval, intervals, resampling_counts
from milan_ray.scoring.evaluation import METRICS, Row, score_table, text_statistics
from milan_ray.scoring.text import BertScore, References
from milan_ray.yaml_files import is_number, known, mapping, number, share, whole, wrong

STRATEGIES = GREEDY, GREEDY_MI, BEAM, BEAM_MI, RERANK, CONTRAST = (
    "greedy",
    "greedy-mi",
    "beam",
    "beam-mi",
    "rerank",
    "contrast",
)
"""Ways to decode: with -mi, the search maximises log p(d|E) − λ log p(d); "rerank" searches by log p(d|E) and ranks the
candidates by log p(d|E) − λ log p(d); "contrast" subtracts μ log p(d|C) too, C the unit's contrasts."""

DESCRIBED = (GREEDY, BEAM, RERANK, CONTRAST)
"""Strategies that ``describe`` offers: it never searches by mutual information."""

SPLITS = VALIDATION, HELD_OUT = ("validation", "held-out")


@dataclass(frozen=True)
class Sweep:
    """The settings to try, and how to choose one.

    Attributes:
        beam_sizes: Beams per unit, for the strategies that have beams.
        lams: Values of λ, for the strategies that use λ.
        strategies: Of :data:`STRATEGIES`.
        lengths: Maximum numbers of tokens, ``<stop>`` included.
        metric: The metric that chooses, of :data:`~milan_ray.scoring.evaluation.METRICS`.
        validation: Share of the annotated units that choose a setting; the others are held out.
        seed: Seed of this split and of the bootstrap.
        samples: Bootstrap resamples.
        mus: Values of μ, for the strategy "contrast"; with each λ that leaves λ + μ at most 1.
    """

    beam_sizes: tuple[int, ...]
    lams: tuple[float, ...]
    strategies: tuple[str, ...] = (BEAM, RERANK)
    lengths: tuple[int, ...] = (15,)
    metric: str = "bertscore-f"
    validation: float = 0.5
    seed: int = 0
    samples: int = 1000
    mus: tuple[float, ...] = ()

    def identity(self) -> dict[str, object]:
        """The fields that decide the trials; ``mus`` only where there are some, as versions before it had none."""
        fields = asdict(self)
        return fields if self.mus else {name: value for name, value in fields.items() if name != "mus"}

    def trials(self) -> list[Trial]:
        """The trials: settings that differ only in λ and μ of re-ranking share one."""
        trials = []
        positive = tuple(lam for lam in self.lams if lam > 0)
        for length in self.lengths:
            if GREEDY in self.strategies:
                trials.append(Trial(GREEDY, None, length, (0.0,)))
            if GREEDY_MI in self.strategies:
                trials += [Trial(GREEDY_MI, None, length, (lam,)) for lam in positive]
            for beam_size in self.beam_sizes:
                settings = self._reranked()
                if settings:
                    lams, mus = zip(*settings, strict=True)
                    trials.append(Trial(RERANK, beam_size, length, lams, mus if any(mus) else ()))
                if BEAM_MI in self.strategies:
                    trials += [Trial(BEAM_MI, beam_size, length, (lam,)) for lam in positive]
        return trials

    def _reranked(self) -> list[tuple[float, float]]:
        """The values of (λ, μ) that candidates are re-ranked with, ascending."""
        settings = {(0.0, 0.0)} if BEAM in self.strategies else set()
        if RERANK in self.strategies:
            settings |= {(lam, 0.0) for lam in self.lams}
        if CONTRAST in self.strategies:
            settings |= {(lam, mu) for lam in self.lams for mu in self.mus if lam + mu <= 1 + 1e-9}
        return sorted(settings)


@dataclass(frozen=True)
class Trial:
    """One search, and the values of λ and μ that its candidates are re-ranked with.

    Attributes:
        strategy: Of :data:`STRATEGIES`; "beam" is "rerank" with λ = 0.
        beam_size: Beams per unit; None for greedy decoding.
        length: Maximum number of tokens.
        lams: λ of each setting; a single one where λ changes the search.
        mus: μ of each setting; empty where all are 0.
    """

    strategy: str
    beam_size: int | None
    length: int
    lams: tuple[float, ...]
    mus: tuple[float, ...] = ()

    @property
    def settings(self) -> list[tuple[float, float]]:
        """(λ, μ) of each setting."""
        return list(zip(self.lams, self.mus or (0.0,) * len(self.lams), strict=True))

    @property
    def name(self) -> str:
        """Its file name in the work of the sweep."""
        beam = "" if self.beam_size is None else f"-beam{self.beam_size}"
        lam = f"-lam{self.lams[0]:g}" if self.strategy in (GREEDY_MI, BEAM_MI) else ""
        return f"{self.strategy}{beam}-length{self.length}{lam}"

    def strategy_at(self, lam: float, mu: float = 0.0) -> str:
        """The strategy of this trial with one of its λ and μ: "rerank" with λ = 0 is "beam"."""
        if mu > 0:
            return CONTRAST
        return BEAM if self.strategy == RERANK and lam == 0 else self.strategy


@dataclass(frozen=True)
class Setting:
    """A decoding setting, as tuning chooses it and ``describe --setting`` takes it.

    Attributes:
        beam_size: Beams per unit; 1 is greedy decoding.
        length: Maximum number of tokens, ``<stop>`` included.
        lam: λ; 0 ranks by log p(d|E) alone.
        mu: μ of contrastive descriptions; 0 where they were not chosen, None where they were not tried.
    """

    beam_size: int
    length: int
    lam: float
    mu: float | None = None


# -- configuration files ----------------------------------------------------------------------------------------------


def read_sweep(text: str, where: str) -> Sweep:
    """Reads a sweep.

    Args:
        text: YAML with the fields of :class:`Sweep`; numbers as a list, or as ``{from: 0, to: 1, step: 0.05}``, both
            ends included.
        where: Name of the file, for errors.

    Raises:
        MilanError: The text is not YAML, or a key or a value is invalid.
    """
    sweep: dict[str, Any] = {}
    for key, value in mapping(text, where, Sweep).items():
        if key in ("beam_sizes", "lengths", "lams", "mus"):
            sweep[key] = _numbers(value, key, where)
        elif key == "strategies":
            if not isinstance(value, list) or not value:
                raise wrong(where, key, value, f"a list of {', '.join(STRATEGIES)}")
            sweep[key] = tuple(known(f"strategy in {where}:", name, STRATEGIES) for name in value)
        elif key == "metric":
            sweep[key] = known(f"metric in {where}:", value, METRICS)
        elif key == "validation":
            sweep[key] = share(value, key, where)
        else:
            sweep[key] = whole(value, key, where, 0 if key == "seed" else 1)
    if (CONTRAST in sweep.get("strategies", ())) != bool(sweep.get("mus")):
        raise MilanError(f"{where}: the strategy contrast and values of mus need each other; add or leave out both.")
    if any(mu <= 0 for mu in sweep.get("mus", ())):
        raise wrong(where, "mus", sweep["mus"], "numbers above 0: the strategy rerank has none")
    return Sweep(**sweep)


def read_setting(text: str, where: str) -> Setting:
    """Reads a setting; arguments and errors as :func:`read_sweep`."""
    given = mapping(text, where, Setting)
    beam_size, length = (whole(given[key], key, where) for key in ("beam_size", "length"))
    lam, mu = number(given["lam"], "lam", where), given.get("mu")
    return Setting(beam_size, length, lam, None if mu is None else number(mu, "mu", where))


def _numbers(value: object, key: str, where: str) -> tuple[Any, ...]:
    integral = key not in ("lams", "mus")
    wanted = f"a list of {'whole numbers from 1' if integral else 'numbers from 0'}, or {{from: …, to: …, step: …}}"
    numbers: Sequence[Any] = value if isinstance(value, list) else []
    if isinstance(value, dict) and set(value) == {"from", "to", "step"} and all(map(is_number, value.values())):
        first, last, step = value["from"], value["to"], value["step"]
        if step > 0:
            # Rounded, because 0.05 + 2 · 0.05 is not 0.15.
            numbers = [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-6) + 1)]
    integers = all(isinstance(number, int) for number in numbers)
    in_range = all(is_number(number) and number >= (1 if integral else 0) for number in numbers)
    if not numbers or not in_range or (integral and not integers):
        raise wrong(where, key, value, wanted)
    return tuple(sorted({int(number) if integral else float(number) for number in numbers}))


# -- scores -----------------------------------------------------------------------------------------------------------


def split_units(units: int, sweep: Sweep) -> dict[str, np.ndarray]:
    """Splits units at random: split → ascending indices.

    Raises:
        MilanError: A split would be empty.
    """
    validation = round(sweep.validation * units)
    if not 0 < validation < units:
        raise MilanError(
            f"{units} annotated units cannot be split by validation = {sweep.validation:g}: both parts need one; "
            "annotate more units, or change the share."
        )
    order = np.random.default_rng(sweep.seed).permutation(units)
    return {VALIDATION: np.sort(order[:validation]), HELD_OUT: np.sort(order[validation:])}


def rescored(
    texts: Sequence[Sequence[str]],
    finished: np.ndarray,
    logp_d_given_e: np.ndarray,
    logp_d: np.ndarray | None,
    lams: Sequence[float],
    mus: Sequence[float] = (),
    contrasted: np.ndarray | None = None,
) -> list[list[str]]:
    """The best description of every unit for every setting.

    Args:
        texts: Candidates, [unit][beam].
        finished: Whether they reached ``<stop>``, bool (N, beam).
        logp_d_given_e: Nats, (N, beam).
        logp_d: Nats, (N, beam); may be None where λ is 0 only.
        lams: λ of L settings.
        mus: Their μ; empty for 0.
        contrasted: log p(d|C), nats, (N, beam), NaN for a unit without contrasts; may be None where μ is 0.

    Returns:
        [setting][unit]; complete candidates come first, and ties go to the first, as in
        :mod:`milan_ray.stages.descriptions`.
    """
    whole = np.array([complete(*unit) for unit in zip(texts, finished, strict=True)], bool).reshape(finished.shape)
    whole |= ~whole.any(axis=1, keepdims=True)
    descriptions = []
    for lam, mu in zip(lams, mus or [0.0] * len(lams), strict=True):
        scores = logp_d_given_e if logp_d is None else rescore(logp_d_given_e, logp_d, lam)
        if mu and contrasted is not None:
            scores = contrast(scores, contrasted, mu)
        chosen = np.where(whole, scores, -np.inf).argmax(axis=1)
        descriptions.append([readable(beams[best]) for beams, best in zip(texts, chosen, strict=True)])
    return descriptions


def trial_scores(
    descriptions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    splits: Mapping[str, np.ndarray],
    bert_score: BertScore | None,
    samples: int,
    seed: int,
) -> pl.DataFrame:
    """Scores descriptions of N units by L settings; each distinct description of a unit is scored once.

    Args:
        descriptions: [setting][unit].
        references: Annotations of each unit.
        splits: Name → indices of its units.
        bert_score: The scorer; None leaves BERTScore out.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Columns setting (its index), split, metric, value, low, high, n.
    """
    indices, texts, answers = _distinct(descriptions, references)
    counts = {split: resampling_counts(len(units), samples, seed) for split, units in splits.items()}
    # Settings with equal descriptions of all units, such as those with λ in a small interval, are scored once.
    distinct = {split: np.unique(indices[:, units], axis=0, return_inverse=True) for split, units in splits.items()}
    rows: list[tuple[object, ...]] = []
    for metric, statistics, measure in text_statistics(texts, answers, references, bert_score):
        for split, units in splits.items():
            settings, inverse = distinct[split]
            scores = intervals(statistics[settings], measure, counts[split])[inverse.ravel()].tolist()
            rows += [(setting, split, metric, *score, len(units)) for setting, score in enumerate(scores)]
    names = ["setting", "split", "metric", "value", "low", "high", "n"]
    return pl.DataFrame(rows, schema=names, orient="row")


class CachedBertScore(BertScore):
    """BERTScore with a cache: searches with different beams find many equal descriptions."""

    def __call__(
        self, predictions: Sequence[str], references: References, idf_references: Sequence[str] | None = None
    ) -> np.ndarray:
        """As :class:`~milan_ray.scoring.text.BertScore`; other ``idf_references`` than before clear the cache."""
        if idf_references is None:  # the weights depend on the references of this call
            return super().__call__(predictions, references)
        if tuple(idf_references) != self._idf_references:
            self._scores, self._idf_references = {}, tuple(idf_references)
        pairs = [
            (text, (group,) if isinstance(group, str) else tuple(group))
            for text, group in zip(predictions, references, strict=True)
        ]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._scores]
        if new:
            texts, answers = zip(*new, strict=True)
            self._scores.update(zip(new, super().__call__(texts, answers, idf_references), strict=True))
        return np.array([self._scores[pair] for pair in pairs]).reshape(-1, 3)

    _scores: dict[tuple[str, tuple[str, ...]], np.ndarray]
    _idf_references: tuple[str, ...] | None = None


def _distinct(
    descriptions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[np.ndarray, list[str], list[Sequence[str]]]:
    """The distinct descriptions of each unit: indices into them (L, N), their texts, their units' annotations."""
    index: dict[tuple[int, str], int] = {}
    indices = np.array([[index.setdefault(pair, len(index)) for pair in enumerate(texts)] for texts in descriptions])
    return indices, [text for _, text in index], [references[unit] for unit, _ in index]


def best_trial(trials: pl.DataFrame, metric: str, strategies: Sequence[str] = DESCRIBED) -> dict[str, Any]:
    """The row of a table of trials with the highest score on the validation units.

    Ties go to the fewest beams, then the shortest length, then the smallest λ and μ.

    Args:
        trials: Columns of :data:`~milan_ray.schema.TRIALS`.
        metric: The metric that chooses.
        strategies: Strategies that may be chosen.

    Raises:
        MilanError: No trial has one of the strategies.
    """
    rows = trials.filter(
        pl.col("split") == VALIDATION, pl.col("metric") == metric, pl.col("strategy").is_in(list(strategies))
    )
    if rows.is_empty():
        raise MilanError(f"nothing was tried that can be described with; add one of {', '.join(DESCRIBED)}.")
    order = ["value", "beam_size", "length", "lam", *(["mu"] if "mu" in rows.columns else [])]
    return rows.sort(order, descending=[True, *[False] * (len(order) - 1)], nulls_last=False).row(0, named=True)


def compare_systems(
    experiment: str,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    units: np.ndarray,
    bert_score: BertScore | None,
    samples: int,
    seed: int,
) -> pa.Table:
    """Scores systems on the same units, and the differences between the first system and each other one.

    Args:
        experiment: Name of the evaluation.
        systems: System → description of each of N units.
        references: Annotations of each unit.
        units: Indices of the units to score.
        bert_score: The scorer; None leaves BERTScore out.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        A table of schema SCORES; differences have paired intervals.
    """
    n = len(units)
    counts = resampling_counts(n, samples, seed)
    first, *others = systems
    indices, texts, answers = _distinct(list(systems.values()), references)
    note = f"paired difference; above 0: {first} is better"
    rows: list[Row] = []
    for metric, statistics, measure in text_statistics(texts, answers, references, bert_score):
        of_system = dict(zip(systems, statistics[indices[:, units]], strict=True))
        rows += [
            (name, metric, interval(values, measure, counts), n, "on units that chose nothing")
            for name, values in of_system.items()
        ]
        rows += [
            (f"{first} − {other}", metric, difference(of_system[first], of_system[other], measure, counts), n, note)
            for other in others
        ]
    return score_table(experiment, rows)
