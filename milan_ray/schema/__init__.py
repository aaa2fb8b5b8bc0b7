"""The tables of a run directory: one :class:`~milan_ray.schema.table.Table` per kind of row."""

from milan_ray.schema.annotation_statistics import ANNOTATION_STATISTICS
from milan_ray.schema.audits import AUDITED, AUDITS
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
from milan_ray.schema.effects import EFFECTS
from milan_ray.schema.exemplars import EXEMPLARS, LEVELS, POOLED, SKIPPED, VIEWS
from milan_ray.schema.experiments import ABLATIONS, CLAIMS, CRITERIA, FIGURE, LAYER_PROPERTIES, PASTED
from milan_ray.schema.features import FEATURES_FIT
from milan_ray.schema.generalization import GENERALIZATION, HELD_OUT, SPLITS
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
from milan_ray.schema.ratings import RATED_SCORES, RATING_DRAWS, RATINGS
from milan_ray.schema.table import Column, Table
from milan_ray.schema.verdicts import CALIBRATIONS, VERDICTS

TABLES: tuple[Table, ...] = (
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
    VERDICTS,
    CALIBRATIONS,
    TRIALS,
    DECODER_TRIALS,
    DIFFERENCES,
    CHANGES,
    ABLATIONS,
    CRITERIA,
    SPLITS,
    HELD_OUT,
    GENERALIZATION,
    LAYER_PROPERTIES,
    PASTED,
    CLAIMS,
    ANNOTATION_STATISTICS,
    AUDITS,
    AUDITED,
    FEATURES_FIT,
    EFFECTS,
    RATING_DRAWS,
    RATINGS,
    RATED_SCORES,
)

__all__ = [
    "ABLATIONS",
    "ANNOTATIONS",
    "ANNOTATION_STATISTICS",
    "AUDITED",
    "AUDITS",
    "CALIBRATIONS",
    "CANDIDATES",
    "CHANGES",
    "CLAIMS",
    "CRITERIA",
    "DECODER_TRIALS",
    "DESCRIPTIONS",
    "DIFFERENCES",
    "DRAWINGS",
    "EFFECTS",
    "ENCODINGS",
    "EXEMPLARS",
    "FEATURES_FIT",
    "FIGURE",
    "GENERALIZATION",
    "HELD_OUT",
    "IMAGE_EMBEDDINGS",
    "LAYER_PROPERTIES",
    "LEVELS",
    "MANIFEST",
    "PASTED",
    "POOLED",
    "RATED_SCORES",
    "RATINGS",
    "RATING_DRAWS",
    "RUNS",
    "SCORES",
    "SKIPPED",
    "SPLITS",
    "TABLES",
    "TEXT_EMBEDDINGS",
    "TRAINING",
    "TRIALS",
    "TRIALS_FIGURE",
    "TRIALS_SETTING",
    "UNIT_SCORES",
    "VERDICTS",
    "VIEWS",
    "Column",
    "Table",
]
