"""Verdicts on descriptions, and the curves that turn their evidence into probabilities."""

import pyarrow as pa

from milan_ray.schema.table import UNIT, Column, Table

_PREDICTOR = Column("predictor", pa.string(), "model of images and texts that a description is judged by")

VERDICTS = Table(
    "verdicts",
    ("predictor", "labeler", "model", "layer"),
    (
        _PREDICTOR,
        Column("labeler", pa.string(), "whose description; truth: the known concepts that a calibration learns from"),
        *UNIT,
        Column("system", pa.string(), "own, or what costs nothing: shuffled (another unit's), constant (one for all)"),
        Column("description", pa.string(), "what was judged"),
        Column("verdict", pa.string(), "supported, partly, unsupported or nothing to describe (docs/verdicts.md)"),
        Column("reason", pa.string(), "why, in words"),
        Column("score", pa.float64(), "correlation of activation and fit; null where the activation is constant", True),
        Column("others", pa.float64(), "its mean over the layer's other descriptions; null where there is none", True),
        Column("best", pa.float64(), "the highest of another description; null where there is none", True),
        Column(
            "excess",
            pa.float64(),
            "the score in standard deviations of those of shuffled descriptions, after what a unit has with every "
            "description and a description with every unit; null where fewer than 5 units are described otherwise",
            True,
        ),
        Column("p", pa.float64(), "(1 + b) / (1 + m) over m shuffled pairs of unit and description", True),
        Column("q", pa.float64(), "p after Benjamini and Hochberg, over the units of the layer", True),
        Column("likeness", pa.float64(), "p-value of the exemplars' likeness against random images", True),
        Column("probability", pa.float64(), "that it is true, at even odds; null without a calibration", True),
        Column("f1", pa.float64(), "harmonic mean of precision and recall for the top images; null as cosine", True),
        Column("iou", pa.float64(), "intersection over union with the top images; null as cosine", True),
        Column(
            "cosine",
            pa.float64(),
            "of activation and presence; null where the activation is constant or the judge's fit is no probability",
            True,
        ),
        Column("auprc", pa.float64(), "area under precision and recall for the top images; null as cosine", True),
        Column("images", pa.int64(), "images behind the scores"),
    ),
    "Whether a unit's description is believed, and why.",
)

CALIBRATIONS = Table(
    "calibrations",
    ("predictor",),
    (
        _PREDICTOR,
        Column("intercept", pa.float64(), "log odds of a true description at an excess of 0"),
        Column("slope", pa.float64(), "log odds per standard deviation of excess"),
        Column("true", pa.int64(), "known concepts of units that it learned from"),
        Column("false", pa.int64(), "false descriptions: the known concepts shuffled, and those of untrained networks"),
        Column("auroc", pa.float64(), "how well excess tells the two apart, on what it learned from"),
        Column("models", pa.list_(pa.string()), "networks that it learned from, whose units get no probability"),
    ),
    "The curve that turns excess into the probability that a description is true.",
)

SUPPORTED = "supported"
"""Verdict on a description that jobs may be restricted to."""
