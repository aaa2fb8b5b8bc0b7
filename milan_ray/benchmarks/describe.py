"""Benchmark of descriptions: beam search and re-ranking, compared with the reference's algorithm.

It uses two captioners of the paper's sizes: one with random weights, whose beams never finish, and one trained on human
annotations, where finished beams and units leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from milan_ray.benchmarks.captioners import Sizes, random_features, trained, untrained
from milan_ray.benchmarks.harness import Options, Result, alone, compare
from milan_ray.benchmarks.plain_search import PlainBeams, plain_rerank
from milan_ray.captioner.captioner import Candidates, Captioner

PUBLISHED = 2.01
"""Units per second of the original reference implementation, on two cores of a machine of this kind."""


def run(options: Options) -> Iterator[Result]:
    """Compares descriptions and times for both captioners."""
    sizes = Sizes.of(options)
    batch = 2 if options.short else 16
    features = random_features(batch, sizes.features)
    yield _compare("descriptions, untrained", untrained(sizes), features, options)
    yield _compare("descriptions, trained", trained(options, sizes), features, options)


def _compare(name: str, captioner: Captioner, features: Tensor, options: Options) -> Result:
    candidates: list[Candidates] = []
    plain: list[PlainBeams] = []
    result = compare(
        name,
        lambda: candidates.append(captioner.candidates(features)),
        lambda: plain.append(_plain(captioner, features)),
        options.repeats,
        work=len(features),
        unit="units",
        warm_up=not options.short,
    )
    ours, theirs = candidates[-1], plain[-1]
    assert ours.logp_d is not None
    slow = _through_stop(theirs.tokens.tolist(), captioner.indexer.ids.stop)
    slow_scores = theirs.logp_d_given_e - captioner.lam * theirs.logp_d
    chosen = zip(slow_scores.argmax(dim=1).tolist(), ours.order(captioner.lam)[:, 0].tolist(), strict=True)
    same = [slow[unit][a] == ours.tokens[unit][b] for unit, (a, b) in enumerate(chosen)]
    beams = [a == b for unit in zip(slow, ours.tokens, strict=True) for a, b in zip(*unit, strict=True)]
    likely = np.abs(theirs.logp_d_given_e.numpy() - ours.logp_d_given_e)
    # Equally likely candidates may swap ranks; log p(d) is compared only where they did not.
    prior = np.abs(theirs.logp_d.numpy() - ours.logp_d).ravel()
    speeds = [len(features) / seconds for seconds in result.seconds]
    memory = 0.0 if options.short else alone(_describe_once, captioner, features)[1]
    return result.with_facts(
        descriptions_identical=f"{sum(same)} of {len(same)}",
        candidates_identical=f"{sum(beams)} of {len(beams)}",
        largest_difference_in_log_p=float(max(likely.max(), prior[beams].max())),
        beams_finished=f"{ours.finished.mean():.0%}",
        times_the_published_speed=float(np.median(speeds)) / PUBLISHED,
        peak_memory_MB=memory,
    )


def _plain(captioner: Captioner, features: Tensor) -> PlainBeams:
    assert captioner.lm is not None
    return plain_rerank(captioner.decoder, captioner.lm, features, captioner.beam_size, captioner.length)


def _through_stop(units: list[list[list[int]]], stop: int) -> list[list[list[int]]]:
    """Cuts every beam's tokens after ``<stop>``."""
    return [[row[: row.index(stop) + 1] if stop in row else row for row in rows] for rows in units]


def _describe_once(captioner: Captioner, features: Tensor) -> None:
    captioner.candidates(features)
