"""How many ratings a score needs: images drawn by importance and raters by their errors, against uniform draws.

Simulated people rate the world's planted units (docs/ratings.md): each unit's own concept, which is right, and another
unit's, which is wrong. Every arm is repeated; the standard error is the deviation of its estimates over repetitions,
and bias the difference of their mean from the score of the whole probe with true presence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from milan_ray.benchmarks.harness import Options, Result, elapsed
from milan_ray.errors import MilanError
from milan_ray.models.image_text import ImageText, find_image_text
from milan_ray.scoring.rated_scores import METRICS, estimate, rated_scores
from milan_ray.scoring.raters import Ratings, majority, sample_posterior
from milan_ray.scoring.rating_draws import MIXTURES, draw, features, prior_features, proposal
from milan_ray.scoring.simulation import highest
from milan_ray.world.lexicon import CONCEPT
from milan_ray.world.networks import PlantedNet, planted_concepts
from milan_ray.world.plugin import weights_dir
from milan_ray.world.raters import RATERS, rate
from milan_ray.world.scenes import concept_maps, make_scene
from milan_ray.world.training import PREPROCESS, images_of

SCENES, SHORT_SCENES = 4_000, 200
"""Scenes of the probe."""

TOP = 0.01
"""Share of the scenes, by highest activation, that count as exciting."""

BATCH = 250
"""Scenes per forward pass."""


@dataclass(frozen=True)
class Arm:
    """A way of rating.

    Attributes:
        name: Its name.
        sampling: ``importance`` or ``uniform``.
        draws: Draws per unit.
        raters: Raters per image.
        modelled: Whether raters' errors are modelled and weights calibrated; otherwise the majority's answer counts and
            weights stay as they are.
        judge: Whether the world's model of images and texts takes part.
        overlook: How much more often raters miss small things (:func:`milan_ray.world.raters.rate`).
    """

    name: str
    sampling: str
    draws: int
    raters: int
    modelled: bool = True
    judge: bool = False
    overlook: float = 0.0


BASELINE = Arm("uniform, majority of 3", "uniform", 100, 3, modelled=False)
ARMS = (
    Arm("uniform, majority of 3, ten times as many", "uniform", 600, 3, modelled=False),
    Arm("uniform, modelled raters", "uniform", 100, 3),
    Arm("importance, majority of 3", "importance", 100, 3, modelled=False),
    Arm("importance, 1 modelled rater", "importance", 100, 1),
    Arm("importance, 2 modelled raters", "importance", 100, 2),
    Arm("importance, 2 modelled raters, judge", "importance", 100, 2, judge=True),
    Arm("importance, 2 modelled raters, small things overlooked", "importance", 100, 2, overlook=0.5),
)


@dataclass(frozen=True)
class Case:
    """One description of one unit on N scenes.

    Attributes:
        activations: float64 (N,).
        area: Share of each scene that the description's concept covers, (N,).
        fit: The judge's values, (N,); None without weights of the judge.
        top: bool (N,).
    """

    activations: np.ndarray
    area: np.ndarray
    fit: np.ndarray | None
    top: np.ndarray

    def truth(self) -> np.ndarray:
        """Scores with true presence on all scenes, float64 (5,)."""
        weights = np.full((1, len(self.area)), 1 / len(self.area))
        scores: np.ndarray = rated_scores(weights, self.activations, self.top, self.area > 0)[0]
        return scores


def run(options: Options) -> Iterator[Result]:
    """Simulates every arm; the seconds are those of one campaign of an arm."""
    cases = _cases(options)
    truth = np.stack([case.truth() for case in cases])
    repeats = 2 if options.short else options.repeats
    reference = _Figures.of(BASELINE, cases, truth, repeats)
    yield reference.result(None)
    for arm in ARMS:
        if arm.judge and cases[0].fit is None:
            continue
        yield _Figures.of(arm, cases, truth, repeats).result(reference)


def _cases(options: Options) -> list[Case]:
    """Renders scenes, runs the planted network, and pairs units with concepts."""
    count = SHORT_SCENES if options.short else SCENES
    place = weights_dir()
    network = PlantedNet()
    if not options.short:
        if not (place / "planted.safetensors").is_file():
            raise MilanError(f"the planted network's weights are missing at {place}; make them with jobs.demo.")
        network.load_state_dict(load_file(place / "planted.safetensors"))
    scenes = images_of("probe", 0, count)
    activations = _pooled(network.eval(), scenes)
    columns = {name: number for number, name in enumerate(planted_concepts)}
    area = np.zeros((count, len(columns)))
    for row in range(count):
        for name, shown in concept_maps(make_scene("probe", row)).items():
            if name in columns:
                area[row, columns[name]] = shown.mean()
    fits = _fits(place / "clip", scenes)
    shown = (area > 0).sum(axis=0)
    units = np.flatnonzero((shown >= 5) & (shown <= count - 5) & (activations.std(axis=0) > 0)).tolist()
    top = {unit: highest(activations[:, unit], max(1, round(TOP * count))) for unit in units}
    pairs = [(unit, unit) for unit in units] + [(unit, units[n - 7]) for n, unit in enumerate(units)]
    pairs = pairs[:: 12 if options.short else 1]
    return [
        Case(activations[:, unit], area[:, concept], None if fits is None else fits[:, concept], top[unit])
        for unit, concept in pairs
    ]


@torch.inference_mode()
def _pooled(network: PlantedNet, scenes: torch.Tensor) -> np.ndarray:
    """Mean activations of the planted units, float64 (N, units)."""
    maps: list[torch.Tensor] = []
    hook = network.planted.register_forward_hook(lambda _, __, output: maps.append(output.mean((2, 3))))
    for batch in scenes.split(BATCH):
        network(PREPROCESS(batch))
    hook.remove()
    return torch.cat(maps).double().numpy()


@torch.inference_mode()
def _fits(folder: Path, scenes: torch.Tensor) -> np.ndarray | None:
    """Similarity of scenes and concepts by ``world/clip``, (N, concepts); None where it is not trained."""
    if not (folder / "model.safetensors").is_file():
        return None
    model = ImageText(find_image_text(str(folder)))
    images = torch.cat([model.embed_images(batch.permute(0, 3, 1, 2).float() / 255) for batch in scenes.split(BATCH)])
    fits: np.ndarray = (images @ model.embed_texts([CONCEPT[name].synonyms[0] for name in planted_concepts]).T).numpy()
    return fits


@dataclass(frozen=True)
class _Figures:
    """What repetitions of an arm gave, by metric: deviation, bias, coverage; ratings per description, seconds."""

    arm: Arm
    deviation: np.ndarray
    bias: np.ndarray
    coverage: np.ndarray
    ratings: float
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, arm: Arm, cases: list[Case], truth: np.ndarray, repeats: int) -> _Figures:
        """Repeats an arm."""
        estimates: list[np.ndarray] = []
        counts: list[int] = []

        def once() -> None:
            values, ratings = campaign(arm, cases, np.random.default_rng([len(counts), arm.draws, arm.raters]))
            estimates.append(values)
            counts.append(ratings)

        seconds = tuple(elapsed(once) for _ in range(repeats))
        every = np.stack(estimates)
        values, covered = every[..., 0], (every[..., 1] <= truth + 1e-9) & (truth - 1e-9 <= every[..., 2])
        deviation = np.sqrt((values.std(axis=0, ddof=1) ** 2).mean(axis=0))
        bias = (values.mean(axis=0) - truth).mean(axis=0)
        return cls(arm, deviation, bias, covered.mean(axis=(0, 1)), float(np.mean(counts)) / len(cases), seconds)

    def result(self, reference: _Figures | None) -> Result:
        """Formats the figures, beside those of uniform draws with the majority's answer."""
        facts: dict[str, float | str] = {"ratings per description": self.ratings}
        for number, metric in enumerate(METRICS):
            text = (
                f"standard error {self.deviation[number]:.4f}, bias {self.bias[number]:+.4f}, "
                f"coverage {self.coverage[number]:.3f}"
            )
            if reference is not None:
                variance = (reference.deviation[number] / self.deviation[number]) ** 2
                text += f", {variance * reference.ratings / self.ratings:.1f} times fewer ratings"
            facts[metric] = text
        return Result(self.arm.name, self.seconds, facts=facts, unit="campaigns")


def campaign(arm: Arm, cases: list[Case], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Draws images of every case, lets people rate them, and estimates the scores.

    Returns:
        Estimates with the ends of their intervals, float64 (cases, 5, 3), and the number of ratings.
    """
    drawn, priors, areas, owners = [], [], [], []
    items = 0
    for number, case in enumerate(cases):
        fit = case.fit if arm.judge else None
        q = proposal(case.activations, fit, MIXTURES[arm.sampling])
        index = draw(q, arm.draws, rng)
        distinct, place = np.unique(index, return_inverse=True)
        drawn.append((index, place + items, 1 / (len(q) * q[index])))
        priors.append(prior_features(case.activations, fit)[distinct])
        areas.append(case.area[distinct])
        owners.append(np.full(len(distinct), number))
        items += len(distinct)
    item = np.repeat(np.arange(items), arm.raters)
    rater = np.argsort(rng.random((items, len(RATERS))), axis=1)[:, : arm.raters].ravel()
    ratings = Ratings(item, rater, rate(np.concatenate(areas)[item], rater, rng, arm.overlook))
    if arm.modelled:
        posterior = sample_posterior(ratings, np.concatenate(priors), np.concatenate(owners), len(RATERS), rng)
        presence, shown = posterior.presence, posterior.shown
    else:
        presence = shown = np.repeat(majority(ratings, items)[None], 200, axis=0)
    estimates = []
    for case, (index, place, weights) in zip(cases, drawn, strict=True):
        known = np.zeros((arm.draws, 0))
        if arm.modelled and arm.sampling == "importance":
            known = features(case.activations, case.top, case.fit if arm.judge else None)[index]
        chosen = (case.activations[index], case.top[index], presence[:, place], shown[:, place])
        estimates.append([tuple(each) for each in estimate(weights, known, *chosen, rng)])
    return np.array(estimates), len(item)
