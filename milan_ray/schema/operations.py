"""What ran and how well: runs and scores."""

import pyarrow as pa

from milan_ray.schema.table import Column, Noun

RUNS = Noun(
    "runs",
    ("stage", "run", "model"),
    (
        Column("stage", pa.string(), "exemplars, encodings, candidates or training"),
        Column("run", pa.string(), "configuration hash of what was made"),
        Column("model", pa.string(), "registered name of the model; for training, of all its models"),
        Column("layer", pa.string(), "module path of the layer; empty when the run covers all of a model's"),
        Column("rows", pa.int64(), "rows written"),
        Column("images", pa.int64(), "images used; 0 where the stage reads none"),
        Column("seconds", pa.float64(), "wall-clock seconds of the stage for this model"),
        Column("finished_at", pa.string(), "UTC, ISO 8601"),
        Column("versions", pa.string(), "JSON: milan_ray, torch, ray"),
    ),
    "One finished piece of work.",
)

SCORES = Noun(
    "scores",
    ("experiment",),
    (
        Column("experiment", pa.string(), "name of the evaluation"),
        Column("system", pa.string(), "what was scored: milan, p(d|E), constant, shuffled, …"),
        Column("metric", pa.string(), "name of the measure"),
        Column("value", pa.float64(), "the measure"),
        Column("low", pa.float64(), "lower end of the 95 % bootstrap interval; null without one", True),
        Column("high", pa.float64(), "upper end of the 95 % bootstrap interval; null without one", True),
        Column("n", pa.int64(), "units (or other items) behind the value"),
        Column("note", pa.string(), "how to read it; empty when the name says it"),
    ),
    "One figure of an evaluation.",
)

TRAINING = Noun(
    "training",
    ("decoder",),
    (
        Column("decoder", pa.string(), "name of the captioner"),
        Column("part", pa.string(), "lm (language model) or decoder"),
        Column("epoch", pa.int32(), "counted from 0"),
        Column("train_loss", pa.float64(), "mean over batches; nats per token, the decoder's regulariser included"),
        Column("validation", pa.float64(), "lm: nats per token; decoder: BLEU (0–100) of greedy captions"),
        Column("kept", pa.bool_(), "whether the captioner has this epoch's weights"),
        Column("sample", pa.string(), "the decoder's caption of one validation unit; empty for the language model"),
    ),
    "One epoch of a captioner's training.",
)
