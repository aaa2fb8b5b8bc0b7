"""Effects of units on the classes that a network tells."""

import pyarrow as pa

from milan_ray.schema.table import UNIT, Column, Table

CLASSES = pa.list_(
    pa.struct(
        [
            ("class", pa.int32()),
            ("name", pa.string()),
            ("probability", pa.float64()),
            ("logit", pa.float64()),
            ("predicted", pa.float64()),
        ]
    )
)
"""Classes and how they changed: number, name (null where the model has none), mean changes, change of a share."""

EFFECTS = Table(
    "effects",
    ("model", "layer"),
    (
        *UNIT,
        Column(
            "change",
            pa.string(),
            "ablated (to 0), amplified, or the baseline random (as much taken off along a random direction)",
        ),
        Column("images", pa.int64(), "images behind the figures"),
        Column(
            "active", pa.int64(), "of these, images on which the unit is not 0 everywhere; on others nothing changes"
        ),
        Column("strength", pa.float64(), "mean over images and positions of the absolute value that was changed"),
        Column("moved", pa.float64(), "mean over images of ½ Σ|Δp| over classes: probability that moved between them"),
        Column("flipped", pa.float64(), "share of images whose most probable class changed"),
        Column(
            "gained",
            CLASSES,
            "classes whose probability rose most, first the most: class, name, mean change of probability and of "
            "logit, change of the share of images predicted as it; empty for random",
        ),
        Column("lost", CLASSES, "classes whose probability fell most, likewise"),
        Column(
            "peer",
            pa.int32(),
            "another unit, of the nearest strength: a baseline; null for a silent unit and with --units",
            True,
        ),
        Column("peer_moved", pa.float64(), "the same change of the peer: its moved; null without a peer", True),
    ),
    "What one change of one unit does to the classes.",
)
