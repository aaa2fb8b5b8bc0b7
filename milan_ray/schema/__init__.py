"""The tables of a run directory: one :class:`~milan_ray.schema.table.Noun` per kind of row."""

from milan_ray.schema.descriptions import ANNOTATIONS, CANDIDATES, DESCRIPTIONS, ENCODINGS
from milan_ray.schema.exemplars import EXEMPLARS, LEVELS, POOLED, SKIPPED, VIEWS
from milan_ray.schema.manifest import MANIFEST
from milan_ray.schema.operations import (
    DECODER_TRIALS,
    RUNS,
    SCORES,
    TRAINING,
    TRIALS,
    TRIALS_FIGURE,
    TRIALS_SETTING,
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
    CANDIDATES,
    DESCRIPTIONS,
    ANNOTATIONS,
    TRAINING,
    RUNS,
    SCORES,
    TRIALS,
    DECODER_TRIALS,
)

__all__ = [
    "ANNOTATIONS",
    "CANDIDATES",
    "DECODER_TRIALS",
    "DESCRIPTIONS",
    "ENCODINGS",
    "EXEMPLARS",
    "LEVELS",
    "MANIFEST",
    "NOUNS",
    "POOLED",
    "RUNS",
    "SCORES",
    "SKIPPED",
    "TRAINING",
    "TRIALS",
    "TRIALS_FIGURE",
    "TRIALS_SETTING",
    "VIEWS",
    "Column",
    "Noun",
]
