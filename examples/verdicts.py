"""Measures verdicts on the built-in world: AUROC, calibration, and the realised rate of false discoveries.

Run after ``jobs.demo`` and the commands of docs/verdicts.md, which make the tables that this reads:
``python examples/verdicts.py results/demo``.
"""

from __future__ import annotations

import sys

import numpy as np

from milan_ray.engine.references import load
from milan_ray.models.image_text import ImageTextRef
from milan_ray.plugins import load_plugins
from milan_ray.schema import IMAGE_EMBEDDINGS, VERDICTS
from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import unit_values
from milan_ray.scoring.verdicts import RATE, calibrate, cross_correlations, weigh
from milan_ray.stages.embeddings import image_embeddings
from milan_ray.stages.scores import Described, ScoreConfig
from milan_ray.stages.scores.inputs import UnitActivations
from milan_ray.storage import Storage
from milan_ray.world.networks import planted_concepts

JUDGE, PLANTED, UNTRAINED, LABELER = "world/truth", "world/planted", "world/resnet-random", "milan"
SHUFFLES = 2000


def excesses(storage: Storage, model: str, labeler: str, system: str = "own") -> np.ndarray:
    """Finite excesses of a model's units, by table ``verdicts``."""
    values = []
    for keys in storage.partitions(VERDICTS, predictor=JUDGE, model=model, labeler=labeler):
        rows = storage.read(VERDICTS, ["system", "excess"], **keys).to_pylist()
        values += [row["excess"] for row in rows if row["system"] == system and row["excess"] is not None]
    return np.array(values)


def area(true: np.ndarray, false: np.ndarray) -> str:
    """AUROC of true against false descriptions, with its 95 % bootstrap interval over both."""
    rng, both = np.random.default_rng(0), np.concatenate([true, false])
    is_true = np.arange(len(both)) < len(true)

    def one(places: np.ndarray) -> float:
        return float(auroc(both[places, None], is_true[places, None])[0, 0])

    draws = [
        one(np.concatenate([rng.integers(len(true), size=len(true)), rng.integers(len(true), len(both), len(false))]))
        for _ in range(1000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{one(np.arange(len(both))):.3f} [{low:.3f}, {high:.3f}] ({len(true)} true, {len(false)} false)"


def known_scores(storage: Storage) -> np.ndarray:
    """Correlations of the planted units with all planted concepts, (U, U), on images that are not their exemplars."""
    load_plugins(["milan_ray.world.plugin"])
    (keys,) = storage.partitions(IMAGE_EMBEDDINGS, encoder=JUDGE)
    ids, images = image_embeddings(storage, **keys)
    layer, units = Described("truth", PLANTED, "planted"), range(len(planted_concepts))
    responses = UnitActivations.read(storage, layer, units, ScoreConfig(), ids)
    texts = load(ImageTextRef(JUDGE), ("milan_ray.world.plugin",)).embed_texts(planted_concepts).numpy()
    fits = images[np.searchsorted(ids, responses.ids)] @ texts.T
    return cross_correlations([(responses.activations, responses.use, fits)], len(units))


def discoveries(scores: np.ndarray, share: float) -> str:
    """Realised rate of false discoveries, and power, where a share of the concepts is shuffled, over many shuffles."""
    units = len(scores)
    count = round(share * units)
    rates, found = np.zeros(SHUFFLES), []
    for seed in range(SHUFFLES):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(units, count, replace=False)
        own, false = np.arange(units), np.isin(np.arange(units), chosen)
        own[chosen] = np.roll(chosen, 1)
        discovered = weigh(scores, own).q <= RATE
        rates[seed] = (discovered & false).sum() / max(1, discovered.sum())
        found += [(discovered & ~false).sum() / (units - count)] if count < units else []
    mean = interval(unit_values(rates), ratio, resampling_counts(SHUFFLES))
    power = f"{np.mean(found):.2f}" if found else "–"
    return f"{share:.0%} shuffled: realised {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}], power {power}"


def calibration_error(true: np.ndarray, false: np.ndarray) -> str:
    """Probabilities of descriptions that the curve did not learn from (five folds), by tenths, against what is true."""
    rng = np.random.default_rng(0)
    values, truth = np.concatenate([true, false]), np.arange(len(true) + len(false)) < len(true)
    fold, p = rng.integers(5, size=len(values)), np.empty(len(values))
    for number in range(5):
        p[fold == number] = calibrate(values[fold != number], truth[fold != number])(values[fold == number])
    weight = np.where(truth, 0.5 / len(true), 0.5 / len(false))  # even odds, as the curve has
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [
        weight[bins == one].sum() * abs(np.average(p[bins == one] - truth[bins == one], weights=weight[bins == one]))
        for one in np.unique(bins)
    ]
    brier = float(np.sum(weight * (p - truth) ** 2))
    return f"expected calibration error {sum(gaps):.3f}, Brier score {brier:.3f} (.25: always one half)"


def main(folder: str) -> None:
    """Prints all figures."""
    storage = Storage(folder)
    true, shuffled = (excesses(storage, PLANTED, "truth", system) for system in ("own", "shuffled"))
    untrained = excesses(storage, UNTRAINED, LABELER)
    said, said_shuffled = (excesses(storage, PLANTED, LABELER, system) for system in ("own", "shuffled"))
    false = np.concatenate([shuffled, untrained])
    print(f"AUROC, known concepts against shuffled and untrained: {area(true, false)}")
    print(f"  against shuffled alone: {area(true, shuffled)}")
    print(f"  against untrained alone: {area(true, untrained)}")
    print(f"AUROC, what {LABELER} says of planted units: {area(said, np.concatenate([said_shuffled, untrained]))}")
    print(f"calibration, five folds: {calibration_error(true, false)}")
    scores = known_scores(storage)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        print(f"false discoveries, {discoveries(scores, share)}")


if __name__ == "__main__":
    main(sys.argv[1])
