"""What the paper's experiments find: units by criteria, accuracy as they are ablated."""

import pyarrow as pa

from milan_ray.schema.table import Column, Noun

ABLATIONS = Noun(
    "ablations",
    ("experiment", "model"),
    (
        Column("experiment", pa.string(), "name of the experiment"),
        Column("model", pa.string(), "registered name of the model"),
        Column("condition", pa.string(), "by what units were ordered: nouns, description-length, random, sort-text, …"),
        Column("trial", pa.int32(), "counted from 0; only random orders have several"),
        Column("split", pa.string(), "images on which accuracy was counted"),
        Column("fraction", pa.float64(), "share of all units ablated"),
        Column("ablated", pa.int32(), "units ablated: the first of the order"),
        Column("class", pa.string(), "name of the class; empty for all images"),
        Column("accuracy", pa.float64(), "share of images classified correctly; null without images", True),
        Column("n", pa.int64(), "images behind it"),
    ),
    "Accuracy of a classifier with the first units of an order switched off.",
)

CRITERIA = Noun(
    "criteria",
    ("experiment", "model"),
    (
        Column("experiment", pa.string(), "name of the experiment"),
        Column("model", pa.string(), "registered name of the model"),
        Column("layer", pa.string(), "module path of the layer"),
        Column("unit", pa.int32(), "number of the unit in its layer"),
        Column("criterion", pa.string(), "what was scored, e.g. nouns or validation accuracy without the unit"),
        Column("score", pa.float64(), "the score; units are ablated from the highest down"),
        Column("description", pa.string(), "the description that it was taken from"),
    ),
    "One unit by one criterion of an experiment.",
)

FIGURE = "figure"
"""Stem of the files beside an experiment's table: ``figure.svg``, ``figure.png``."""
