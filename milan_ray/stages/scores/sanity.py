"""Checks of the scores themselves, on layers whose units' concepts are known (``scoring/score_sanity.py``)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from milan_ray.config import Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, TaskStage
from milan_ray.errors import MilanError
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.schema import IMAGE_EMBEDDINGS, POOLED, SCORES
from milan_ray.scoring.score_sanity import sanity
from milan_ray.scoring.score_sanity import scores as measures
from milan_ray.stages.embeddings import ImageEmbeddings, image_embeddings
from milan_ray.stages.scores.inputs import WORDLESS, Classes, Described, ScoreConfig, UnitActivations, check_pooled
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


def truth_of(ref: ImageTextRef, probe: references.ProbeRef) -> Embedder:
    """Loads the truth of concept maps, by which scores are judged.

    Raises:
        MilanError: It is a model.
    """
    embedder = references.load(ref, probe.plugins)
    if embedder.view is not None:
        raise MilanError(f"{ref.name} is a model, not the truth: scores are judged by concept maps alone.")
    return embedder
