"""Comparison of two networks' descriptions: by word, and by unit."""

import pyarrow as pa

from milan_ray.schema.table import Column, Table

_KEYS = (
    Column("labeler", pa.string(), "whose descriptions are compared"),
    Column("model", pa.string(), "the network to start from"),
    Column("other", pa.string(), "the one compared with it"),
)

DIFFERENCES = Table(
    "differences",
    ("labeler", "model", "other"),
    (
        *_KEYS,
        Column("word", pa.string(), "the word, for all its forms; or what was asked for"),
        Column("layer", pa.string(), "module path; empty for all layers together"),
        Column("units", pa.int64(), "the model's units with the word"),
        Column("of", pa.int64(), "the model's units"),
        Column("other_units", pa.int64(), "the other's units with the word"),
        Column("other_of", pa.int64(), "the other's units"),
        Column("difference", pa.float64(), "share in the other less share in the model"),
        Column("low", pa.float64(), "lower end of its 95 % interval (Newcombe)"),
        Column("high", pa.float64(), "upper end of its 95 % interval"),
        Column("p", pa.float64(), "Fisher's exact test, two-sided; units taken for independent"),
        Column("q", pa.float64(), "p after Benjamini and Hochberg, over the words of the layer"),
    ),
    "How often two networks' units mention a word.",
)

CHANGES = Table(
    "changes",
    ("labeler", "model", "other"),
    (
        *_KEYS,
        Column("layer", pa.string(), "module path, the same in both"),
        Column("unit", pa.int32(), "channel index, the same in both"),
        Column("description", pa.string(), "the model's"),
        Column("other_description", pa.string(), "the other's"),
        Column("gained", pa.list_(pa.string()), "words of the other's description alone"),
        Column("lost", pa.list_(pa.string()), "words of the model's description alone"),
    ),
    "A unit whose descriptions differ between two networks.",
)
