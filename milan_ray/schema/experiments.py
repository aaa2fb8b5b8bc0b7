"""Results of the paper's experiments: units by criteria, accuracy under ablation, claims."""

import pyarrow as pa

from milan_ray.schema.table import EXPERIMENT, MODEL, STUDIED_LAYER, STUDIED_UNIT, Column, Table

ABLATIONS = Table(
    "ablations",
    ("experiment", "model"),
    (
        EXPERIMENT,
        MODEL,
        Column("condition", pa.string(), "by what units were ordered: nouns, description-length, random, sort-text, …"),
        Column(
            "trial", pa.int32(), "counted from 0; random orders, and those with ties broken at random, have several"
        ),
        Column("split", pa.string(), "images on which accuracy was counted"),
        Column("fraction", pa.float64(), "share of all units ablated"),
        Column("ablated", pa.int32(), "units ablated: the first of the order"),
        Column("class", pa.string(), "name of the class; empty for all images"),
        Column("accuracy", pa.float64(), "share of images classified correctly; null without images", True),
        Column("n", pa.int64(), "images behind it"),
    ),
    "Accuracy of a classifier with the first units of an order ablated.",
)

CRITERIA = Table(
    "criteria",
    ("experiment", "model"),
    (
        EXPERIMENT,
        *STUDIED_UNIT,
        Column("criterion", pa.string(), "what was scored, e.g. nouns or validation accuracy without the unit"),
        Column("score", pa.float64(), "the score; units are ablated from the highest down"),
        Column("description", pa.string(), "the description that it was taken from"),
    ),
    "One unit by one criterion of an experiment.",
)

LAYER_PROPERTIES = Table(
    "layer_properties",
    ("experiment", "model"),
    (
        EXPERIMENT,
        *STUDIED_LAYER,
        Column("property", pa.string(), "property of descriptions, e.g. contains an adjective"),
        Column("holding", pa.int64(), "units of the layer whose description has it"),
        Column("units", pa.int64(), "described units of the layer"),
        Column("share", pa.float64(), "holding / units"),
        Column("low", pa.float64(), "lower end of the share's 95 % interval (Wilson)"),
        Column("high", pa.float64(), "upper end of it"),
    ),
    "How common a property of descriptions is in one layer.",
)

CLAIMS = Table(
    "claims",
    ("experiment",),
    (
        EXPERIMENT,
        Column("claim", pa.string(), "what the paper says, in a sentence"),
        Column("paper", pa.string(), "the paper's figures for it, and where they stand"),
        Column("ours", pa.string(), "what was found on the built-in world"),
        Column(
            "reproduced", pa.bool_(), "whether the shape of the result is the same; null where it cannot be said", True
        ),
        Column("note", pa.string(), "why not, or what is different here"),
        Column("small", pa.bool_(), "whether sizes were those of a test, so that figures mean nothing"),
        Column("seconds", pa.float64(), "how long the experiment took, this time"),
    ),
    "One claim of the paper, with the result here.",
)

PASTED = Table(
    "pasted",
    ("experiment", "model"),
    (
        EXPERIMENT,
        *STUDIED_UNIT,
        Column("group", pa.string(), "why the unit was chosen: different words, other units"),
        Column("score", pa.float64(), "its description's word difference"),
        Column("description", pa.string(), "its description"),
        Column("targets", pa.list_(pa.string()), "classes that the unit speaks for most, the strongest first"),
        Column("original", pa.int64(), "image that something is pasted on: row of the manifest of the images given"),
        Column("original_class", pa.string(), "its class, which the model tells"),
        Column("distractor", pa.int64(), "exemplar that it is cut from: row of the manifest of the exemplars' probe"),
        Column("distractor_class", pa.string(), "what the model takes that image for"),
        Column("predicted", pa.string(), "what the model takes the result for"),
        Column("fooled", pa.bool_(), "whether that is one of the targets and neither image's class"),
        Column("control", pa.int64(), "image of those given from which the same cut was taken for comparison"),
        Column("control_class", pa.string(), "what the model takes that image for"),
        Column("control_predicted", pa.string(), "what the model takes the original with that cut for"),
        Column("control_fooled", pa.bool_(), "the same of it"),
    ),
    "One cut-and-paste image: the masked region of a unit's exemplar, pasted on an image that does not activate it.",
)

FIGURE = "figure"
"""Stem of the files beside an experiment's table: ``figure.svg``, ``figure.png``."""
