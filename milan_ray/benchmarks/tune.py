"""Benchmark of tuning: a trial with 100 values of λ, compared with one with a single value, both with all scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from milan_ray.benchmarks.captioners import Sizes, random_features, trained
from milan_ray.benchmarks.harness import Options, Result, compare
from milan_ray.scoring.evaluation import NO_BERTSCORE
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.stages.tuning_statistics import rescored, trial_scores

LAMS = 100

ANNOTATED_UNITS = 256
"""Annotated units; with few, descriptions rarely repeat, and each distinct text needs an embedding for BERTScore."""


def run(options: Options) -> Iterator[Result]:
    """Compares both trials for a trained captioner of the paper's sizes."""
    sizes = Sizes.of(options)
    captioner = trained(options, sizes)
    features = random_features(4 if options.short else ANNOTATED_UNITS, sizes.features)
    # The least likely candidates stand in for annotations: they have the same length and vocabulary.
    references = [texts[-3:] for texts in captioner.candidates(features).texts]
    halves = dict(zip(("validation", "held-out"), np.array_split(np.arange(len(features)), 2), strict=True))
    folder = minilm_directory()
    bert_score = BertScore(folder) if folder else None

    def trial(lams: list[float]) -> int:
        beams = captioner.candidates(features)
        chosen = rescored(beams.texts, beams.finished, beams.logp_d_given_e, beams.logp_d, lams)
        trial_scores(chosen, references, halves, bert_score, samples=1000, seed=0)
        return len({pair for texts in chosen for pair in enumerate(texts)})

    many = np.linspace(0, 1, LAMS).tolist()
    result = compare(
        f"a trial of {LAMS} values of λ against one",
        lambda: trial(many),
        lambda: trial([0.2]),
        options.repeats,
        work=len(features),
        unit="units",
        warm_up=not options.short,
    )
    yield result.with_facts(
        distinct_descriptions_per_unit=trial(many) / len(features),
        bertscore="MiniLM" if folder else NO_BERTSCORE,
    )
