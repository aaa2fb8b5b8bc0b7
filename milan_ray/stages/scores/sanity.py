"""Checks of the scores themselves, on layers whose units' concepts are known (``scoring/score_sanity.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from milan_ray.config import Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, TaskStage
from milan_ray.errors import MilanError
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.schema import IMAGE_EMBEDDINGS, POOLED, SCORES, VERDICTS
from milan_ray.schema.verdicts import SUPPORTED
from milan_ray.scoring.evaluation import score_table
from milan_ray.scoring.presence import presence_scores
from milan_ray.scoring.score_sanity import JUDGED, sanity
from milan_ray.scoring.score_sanity import scores as measures
from milan_ray.stages.embeddings import ImageEmbeddings, image_embeddings
from milan_ray.stages.scores.inputs import OWN, WORDLESS, Classes, Described, ScoreConfig, UnitActivations, check_pooled
from milan_ray.storage import Storage


class Sanity(TaskStage):
    """How often each score falls when the true concept of a unit is made too narrow or too wide.

    Args:
        images: The probe as the truth of concept maps sees it.
        config: How descriptions are scored.
        concepts: (model, layer) → the concept of each unit.
    """

    table, name, title = SCORES, "sanity", "scores judged"

    def __init__(self, images: ImageEmbeddings, config: ScoreConfig, concepts: Classes) -> None:
        self._images, self._config = images, config
        self._layers = {f"scores judged: {' '.join(layer)}": (layer, names) for layer, names in concepts.items()}

    def outputs(self, known: Known) -> Iterator[Output]:
        """One experiment per layer, by its pooled activations and the probe's embeddings."""
        images = known.config(IMAGE_EMBEDDINGS, **self._images.keys)
        for experiment, ((model, layer), concepts) in self._layers.items():
            check_pooled(known.storage, Described(WORDLESS, model, layer), self._images.digest)
            pooled = known.config(POOLED, model=model, layer=layer)
            decides = {"sanity": 1, "pooled": pooled, "images": images, "config": self._config, "concepts": concepts}
            yield Output({"experiment": experiment}, Fingerprint.of(decides))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Judges the scores on one layer."""
        experiment, config = output.keys["experiment"], self._config
        (model, layer), concepts = self._layers[experiment]
        ids, embedded = image_embeddings(storage, **self._images.keys)
        responses = UnitActivations.read(storage, Described(WORDLESS, model, layer), range(len(concepts)), config, ids)
        texts = self._images.embedder.embed_texts(concepts).numpy()
        truth = embedded[np.searchsorted(ids, responses.ids)] @ texts.T
        complete = responses.use.any(axis=1) & np.isfinite(responses.activations).all(axis=1)
        return sanity(
            experiment,
            responses.activations[complete],
            truth[complete] > 1 - 1e-6,  # the image shows everything that the concept's name names
            measures(config.top, config.retrieved),
            samples=config.samples,
            seed=config.seed,
        )


class DescribedSanity(TaskStage):
    """The same test with descriptions for truth: those that the truth's verdicts support, of all labelers.

    It runs with every job that scores by the truth of concept maps, so that each probe shows which scores to read.

    Args:
        described: What was judged.
        images: The probe as the truth of concept maps sees it.
        config: How descriptions are scored.
    """

    table, name, title = SCORES, "described-sanity", "scores judged by supported descriptions"

    def __init__(self, described: Sequence[Described], images: ImageEmbeddings, config: ScoreConfig) -> None:
        self._images, self._config = images, config
        self._layers: dict[str, list[Described]] = {}
        for layer in described:
            self._layers.setdefault(f"{JUDGED} {layer.model} {layer.layer}", []).append(layer)

    def outputs(self, known: Known) -> Iterator[Output]:
        """One experiment per layer, by the verdicts on its descriptions."""
        predictor = self._images.ref.name
        for experiment, layers in self._layers.items():
            verdicts = [known.config(VERDICTS, predictor=predictor, **layer.keys) for layer in layers]
            decides = {"described-sanity": 1, "verdicts": verdicts, "retrieved": self._config.retrieved}
            yield Output({"experiment": experiment}, Fingerprint.of(decides | {"samples": self._config.samples}))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Judges the scores on one layer; no rows where no description is supported that shows in some images only."""
        experiment, config = output.keys["experiment"], self._config
        pairs = sorted({pair for layer in self._layers[experiment] for pair in self._supported(storage, layer)})
        if not pairs:
            return score_table(experiment, [])
        units, texts = [unit for unit, _ in pairs], [text for _, text in pairs]
        ids, embedded = image_embeddings(storage, **self._images.keys)
        responses = UnitActivations.read(storage, self._layers[experiment][0], units, config, ids)
        vectors = self._images.embedder.embed_texts(texts).numpy()
        shown = embedded[np.searchsorted(ids, responses.ids)] @ vectors.T > 1 - 1e-6
        complete = responses.use.any(axis=1) & np.isfinite(responses.activations).all(axis=1)
        shown, activations = shown[complete], responses.activations[complete]
        if not ((shown.sum(axis=0) >= 2) & (shown.sum(axis=0) < len(shown))).any():
            return score_table(experiment, [])
        every = measures(config.top, config.retrieved) | presence_scores(config.top)
        return sanity(experiment, activations, shown, every, samples=config.samples, seed=config.seed)

    def _supported(self, storage: Storage, layer: Described) -> list[tuple[int, str]]:
        """Units and descriptions that the truth supports."""
        columns = ["unit", "system", "description", "verdict"]
        rows = storage.read(VERDICTS, columns, predictor=self._images.ref.name, **layer.keys).to_pylist()
        return [
            (row["unit"], row["description"]) for row in rows if row["system"] == OWN and row["verdict"] == SUPPORTED
        ]


def truth_of(ref: ImageTextRef, probe: references.ProbeRef) -> Embedder:
    """Loads the truth of concept maps, by which scores are judged.

    Raises:
        MilanError: It is a model.
    """
    embedder = references.load(ref, probe.plugins)
    if embedder.view is not None:
        raise MilanError(f"{ref.name} is a model, not the truth: scores are judged by concept maps alone.")
    return embedder
