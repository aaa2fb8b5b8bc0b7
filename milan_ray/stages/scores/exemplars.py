"""Scores of exemplars alone: clarity, polysemanticity, redundancy (docs/scores.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from milan_ray.config import Fingerprint
from milan_ray.engine.stage import Known, Output, TaskStage
from milan_ray.schema import EXEMPLARS, IMAGE_EMBEDDINGS, UNIT_SCORES
from milan_ray.scoring.clarity import clarity, polysemanticity, redundancy
from milan_ray.stages.embeddings import ImageEmbeddings, embeddings_of
from milan_ray.stages.scores.inputs import KERNEL_VERSION, OWN, ROWS_SCHEMA, WORDLESS, Described, unit_scores
from milan_ray.storage import Storage


class ExemplarScores(TaskStage):
    """Clarity, polysemanticity and redundancy of layers, which need no descriptions.

    Args:
        described: The layers; their labelers do not matter.
        images: The probe as the model of images and texts sees it.
    """

    table, name, recorded = UNIT_SCORES, "scores", True

    def __init__(self, described: Sequence[Described], images: ImageEmbeddings) -> None:
        self._layers = sorted({(layer.model, layer.layer) for layer in described})
        self._images = images.keys
        self.title = f"scores of exemplars by {images.ref.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every layer, by what its exemplars are."""
        images = known.config(IMAGE_EMBEDDINGS, **self._images)
        for model, layer in self._layers:
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            fingerprint = Fingerprint.of({"kernel": KERNEL_VERSION, "images": images, "exemplars": exemplars})
            yield Output({"predictor": self._images["encoder"], **Described(WORDLESS, model, layer).keys}, fingerprint)

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """A layer's scores."""
        table = storage.read(EXEMPLARS, ["unit", "image_id"], **output.of_layer)
        of, images = table["unit"].to_numpy(), table["image_id"].to_numpy()
        ids = np.unique(images)
        vectors = embeddings_of(storage, **self._images, image_ids=ids).astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        units = np.unique(of)
        groups = [vectors[np.searchsorted(ids, images[of == unit])] for unit in units]
        nearest = redundancy(np.stack([group.mean(axis=0) for group in groups])) if groups else np.zeros(0)
        rows = [
            {"unit": unit, "system": OWN, "description": "", "metric": metric, "value": value, "images": len(group)}
            for unit, group, near in zip(units.tolist(), groups, nearest.tolist(), strict=True)
            for metric, value in (
                ("clarity", clarity(group)),
                ("polysemanticity", polysemanticity(group)),
                ("redundancy", near),
            )
        ]
        return unit_scores(output.keys, pa.Table.from_pylist(rows, schema=ROWS_SCHEMA))
