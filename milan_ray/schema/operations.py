"""Runs of stages, scores and trials."""

import pyarrow as pa

from milan_ray.schema.table import UNIT, Column, Table

RUNS = Table(
    "runs",
    ("stage", "run", "model"),
    (
        Column(
            "stage",
            pa.string(),
            "exemplars, pooled, encodings, candidates, image_embeddings, scores, verdicts, cosy, training, tuning, "
            "import, or a labeler whose labels are a stage's work",
        ),
        Column("run", pa.string(), "configuration hash of what was made: of the table's partition, where it is one"),
        Column("model", pa.string(), "registered name of the model; for training, name of the captioner"),
        Column("layer", pa.string(), "module path of the layer; empty when the run is not of one layer"),
        Column("rows", pa.int64(), "rows written"),
        Column("images", pa.int64(), "images used; 0 where the stage reads none"),
        Column(
            "seconds",
            pa.float64(),
            "seconds of one worker (actor, task, trial, training worker), summed over workers: what was done for this "
            "row alone, and an equal share of what was done for several, as a pass for all layers; rows add up to what "
            "the stage took. Putting pieces together is not counted, nor what a killed job had done. In files without "
            "the metadata seconds = share, of earlier versions, layers that share a pass count the whole pass each",
        ),
        Column(
            "images_per_second",
            pa.float64(),
            "images per second of one worker, by whole passes; null where none are read",
            True,
        ),
        Column("finished_at", pa.string(), "UTC, ISO 8601"),
        Column("versions", pa.string(), "JSON: milan_ray, torch, ray"),
    ),
    "The work that a table took, written right before the table.",
)

SHARES = {"seconds": "share"}
"""File metadata of :data:`RUNS` whose seconds add up; files of earlier versions lack it."""

SCORES = Table(
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

UNIT_SCORES = Table(
    "unit_scores",
    ("predictor", "labeler", "model", "layer"),
    (
        Column("predictor", pa.string(), "model of images and texts, or generator, that a description is judged by"),
        Column("labeler", pa.string(), "whose description; exemplars: of a score that needs none"),
        *UNIT,
        Column("system", pa.string(), "own, or what costs nothing: shuffled (another unit's), constant (one for all)"),
        Column("description", pa.string(), "what was judged; empty where there is nothing to say"),
        Column("metric", pa.string(), "name of the measure (docs/scores.md)"),
        Column("value", pa.float64(), "the measure; null for a unit whose activation never changes", True),
        Column("images", pa.int64(), "images behind the value; 0 where it needs none"),
    ),
    "How well one description fits one unit, by one measure.",
)

TRAINING = Table(
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

TRIALS = Table(
    "trials",
    ("decoder", "sweep"),
    (
        Column("decoder", pa.string(), "name of the captioner"),
        Column("sweep", pa.string(), "name of the search space: of its file in tune_configs"),
        Column(
            "strategy", pa.string(), "greedy, greedy-mi, beam, beam-mi, rerank, contrast; beam is rerank with λ = 0"
        ),
        Column("beam_size", pa.int32(), "width of the beam; null for greedy decoding", True),
        Column("length", pa.int32(), "most tokens, <stop> included"),
        Column("lam", pa.float64(), "λ; 0 where log p(d) is not used"),
        Column("split", pa.string(), "validation: the units that choose; held-out: the others"),
        Column("metric", pa.string(), "name of the measure, against the annotations"),
        Column("value", pa.float64(), "the measure"),
        Column("low", pa.float64(), "lower end of the 95 % bootstrap interval over units"),
        Column("high", pa.float64(), "upper end of the 95 % bootstrap interval over units"),
        Column("n", pa.int64(), "units behind the value"),
        Column("chosen", pa.bool_(), "whether this is the setting that was chosen"),
        Column("mu", pa.float64(), "μ; 0 where contrasts are not used; earlier versions lack it", added=True),
    ),
    "One measure of one way to decode.",
)

DECODER_TRIALS = Table(
    "decoder_trials",
    ("sweep",),
    (
        Column("sweep", pa.string(), "name of the search space: of its file in tune_configs"),
        Column("trial", pa.int32(), "counted from 0, the best first"),
        Column("learning_rate", pa.float64(), "AdamW's"),
        Column("embedding", pa.int32(), "size of token embeddings"),
        Column("hidden", pa.int32(), "size of LSTM states"),
        Column("dropout", pa.float64(), "while training"),
        Column("regularization_weight", pa.float64(), "weight of the attention regulariser"),
        Column("encoder", pa.string(), "image encoder whose encodings were read"),
        Column("bleu", pa.float64(), "BLEU (0–100) of greedy captions of the held-out units, after the best epoch"),
        Column("epoch", pa.int32(), "the best epoch, counted from 0"),
        Column("epochs", pa.int32(), "epochs trained"),
        Column(
            "ended", pa.string(), "patience: no more improvement; epochs: all done; asha: worse than others by then"
        ),
        Column("chosen", pa.bool_(), "whether this is the setting that was chosen"),
    ),
    "One way to train a decoder that was tried.",
)

TRIALS_FIGURE = "figure.svg"
"""File beside a table of trials: the scores over λ."""

TRIALS_SETTING = "setting.yaml"
"""File beside a table of trials: the chosen setting."""
