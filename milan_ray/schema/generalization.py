"""Generalization of captioners to units that they were not trained on."""

import pyarrow as pa

from milan_ray.schema.table import EXPERIMENT, STUDIED_UNIT, Column, Table

SPLITS = Table(
    "splits",
    ("experiment", "split"),
    (
        EXPERIMENT,
        Column("split", pa.string(), "name of the split, e.g. within-alexnet-imagenet, alexnet-to-resnet152"),
        Column("trial", pa.int32(), "counted from 0"),
        Column("part", pa.string(), "train: the captioner learned from the unit; test: it was judged on it"),
        *STUDIED_UNIT,
    ),
    "One annotated unit in one trial of a split.",
)

HELD_OUT = Table(
    "held_out",
    ("experiment", "split", "trial"),
    (
        EXPERIMENT,
        Column("split", pa.string(), "name of the split"),
        Column("trial", pa.string(), "counted from 0"),
        Column("system", pa.string(), "milan, milan-pdE (p(d|E) alone), or what costs nothing: constant, nearest-copy"),
        *STUDIED_UNIT,
        Column("description", pa.string(), "what the system says of it"),
    ),
    "A captioner's description of a unit that it was not trained on.",
)

GENERALIZATION = Table(
    "generalization",
    ("experiment", "split"),
    (
        EXPERIMENT,
        Column("split", pa.string(), "name of the split"),
        Column("kind", pa.string(), "within-network, across-architectures, -datasets, -tasks, leave-one-out or own"),
        Column("train", pa.string(), "group whose units the captioner learned from"),
        Column("test", pa.string(), "group whose units it was judged on"),
        Column("trial", pa.int32(), "counted from 0; null: all trials together, units resampled", True),
        Column("system", pa.string(), "milan, milan-pdE, constant, shuffled, nearest-copy, annotators; differences"),
        Column("metric", pa.string(), "bleu, bleu-1 …, rouge-1-f …, bertscore-f; of the texts: words, length, …"),
        Column("value", pa.float64(), "the measure"),
        Column("low", pa.float64(), "lower end of the 95 % bootstrap interval over units; null without one", True),
        Column("high", pa.float64(), "upper end of the 95 % bootstrap interval over units; null without one", True),
        Column("n", pa.int64(), "units behind the value"),
        Column("note", pa.string(), "how to read it"),
    ),
    "One figure of one split.",
)
