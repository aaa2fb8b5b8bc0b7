"""Audits: units whose descriptions name something that the network should not have learned."""

import pyarrow as pa

from milan_ray.schema.table import STUDIED_LAYER, Column, Table

_AUDIT = Column("audit", pa.string(), "name of the audit")

AUDITS = Table(
    "audits",
    ("audit",),
    (
        _AUDIT,
        Column("model", pa.string(), "network trained on images as they are"),
        Column("other", pa.string(), "the same, trained on blurred images"),
        Column("units", pa.int64(), "the model's units with the words, less those that a person rejected"),
        Column("of", pa.int64(), "its described units"),
        Column("rejected", pa.int64(), "its units with the words that a person rejected"),
        Column("unreviewed", pa.int64(), "its units with the words that nobody has looked at yet: they count"),
        Column("other_units", pa.int64(), "the other's units with the words, less those rejected"),
        Column("other_of", pa.int64(), "its described units"),
        Column("other_rejected", pa.int64(), "its units with the words that a person rejected"),
        Column("other_unreviewed", pa.int64(), "its units with the words that nobody has looked at yet: they count"),
        Column("images", pa.string(), "where the exemplars of both come from: roots of the one probe"),
    ),
    "One pair of networks, and the number of their units that name what was blurred.",
)

AUDITED = Table(
    "audited",
    ("audit",),
    (
        _AUDIT,
        *STUDIED_LAYER,
        Column("unit", pa.int32(), "channel index in the layer"),
        Column("description", pa.string(), "its description"),
        Column("words", pa.list_(pa.string()), "which of the words asked for it has"),
        Column("verdict", pa.string(), "of whoever looked at it: accept, reject; empty where nobody has yet"),
        Column("note", pa.string(), "their remark"),
        Column("exemplars", pa.string(), "configuration hash of the exemplars that were there; empty without any"),
    ),
    "One unit whose description has one of the words.",
)

REVIEW = "review.csv"
"""Name of the file beside ``audited`` in which a person accepts or rejects each unit."""

ACCEPT, REJECT = "accept", "reject"
"""Verdicts of a person who reviews a unit; empty before the review."""
