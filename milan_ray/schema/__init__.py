"""The tables of a run directory: one :class:`~milan_ray.schema.table.Noun` per kind of row."""

from milan_ray.schema.descriptions import (
    ANNOTATIONS,
    CANDIDATES,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    IMAGE_EMBEDDINGS,
    TEXT_EMBEDDINGS,
)
from milan_ray.schema.differences import CHANGES, DIFFERENCES
from milan_ray.schema.exemplars import EXEMPLARS, LEVELS, POOLED, SKIPPED, VIEWS
from milan_ray.schema.experiments import ABLATIONS, CRITERIA, FIGURE
from milan_ray.schema.manifest import MANIFEST
from milan_ray.schema.operations import (
    DECODER_TRIALS,
    RUNS,
    SCORES,
    TRAINING,
    TRIALS,
    TRIALS_FIGURE,
    TRIALS_SETTING,
    UNIT_SCORES,
)
from milan_ray.schema.table import Column, Noun

NOUNS: tuple[Noun, ...] = (
    MANIFEST,
    EXEMPLARS,
    LEVELS,
    POOLED,
    VIEWS,
    SKIPPED,
    ENCODINGS,
    IMAGE_EMBEDDINGS,
    TEXT_EMBEDDINGS,
    CANDIDATES,
    DRAWINGS,
    DESCRIPTIONS,
    ANNOTATIONS,
    TRAINING,
    RUNS,
    SCORES,
    UNIT_SCORES,
    TRIALS,
    DECODER_TRIALS,
    DIFFERENCES,
    CHANGES,
    ABLATIONS,
    CRITERIA,
)

__all__ = [
    "ABLATIONS",
    "ANNOTATIONS",
    "CANDIDATES",
    "CHANGES",
    "CRITERIA",
    "DECODER_TRIALS",
    "DESCRIPTIONS",
    "DIFFERENCES",
    "DRAWINGS",
    "ENCODINGS",
    "EXEMPLARS",
    "FIGURE",
    "IMAGE_EMBEDDINGS",
    "LEVELS",
    "MANIFEST",
    "NOUNS",
    "POOLED",
    "RUNS",
    "SCORES",
    "SKIPPED",
    "TEXT_EMBEDDINGS",
    "TRAINING",
    "TRIALS",
    "TRIALS_FIGURE",
    "TRIALS_SETTING",
    "UNIT_SCORES",
    "VIEWS",
    "Column",
    "Noun",
]
