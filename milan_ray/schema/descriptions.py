"""From exemplars to words: encodings, candidates, descriptions, annotations."""

import pyarrow as pa

from milan_ray.schema.table import Column, Noun

_MODEL = Column("model", pa.string(), "registered name of the model")
_LAYER = Column("layer", pa.string(), "module path of the layer inside the model")
_UNIT = Column("unit", pa.int32(), "channel index in the layer")

ENCODINGS = Noun(
    "encodings",
    ("encoder", "model", "layer"),
    (
        Column("encoder", pa.string(), "registered name of the image encoder"),
        _MODEL,
        _LAYER,
        _UNIT,
        Column("rank", pa.int16(), "the exemplar's rank"),
        Column("feature", pa.list_(pa.float32()), "F pooled pyramid features of the masked region; F in metadata"),
    ),
    "What the captioner sees of one exemplar.",
)

CANDIDATES = Noun(
    "candidates",
    ("decoder", "model", "layer"),
    (
        Column("decoder", pa.string(), "name of the captioner; with +clip, of its wide search"),
        _MODEL,
        _LAYER,
        _UNIT,
        Column("lm", pa.string(), "digest of the language model behind logp_d"),
        Column("beam_size", pa.int32(), "width of the beam"),
        Column("beam_rank", pa.int32(), "0 = highest log p(d|E); of a wide search, less λ·log p(d)"),
        Column("tokens", pa.list_(pa.int32()), "token ids up to and including <stop> when finished"),
        Column("finished", pa.bool_(), "whether the beam reached <stop>"),
        Column("logp_d_given_e", pa.float32(), "log p(d|E), nats, summed over tokens"),
        Column("logp_d", pa.float32(), "log p(d), nats, summed over tokens"),
        Column("text", pa.string(), "the description as text"),
    ),
    "One description that the beam proposes for a unit.",
)

NBEST = pa.struct(
    [
        ("text", pa.string()),
        ("score", pa.float32()),
        ("logp_d_given_e", pa.float32()),
        ("logp_d", pa.float32()),
    ]
)

DESCRIPTIONS = Noun(
    "descriptions",
    ("labeler", "model", "layer"),
    (
        Column(
            "labeler", pa.string(), "which method labelled the unit: milan, milan-pdE, milan+clip, netdissect, compexp"
        ),
        _MODEL,
        _LAYER,
        _UNIT,
        Column("description", pa.string(), "the label"),
        Column(
            "score",
            pa.float32(),
            "the labeler's own; milan: log p(d|E) − λ·log p(d), nats; milan+clip: a mean cosine; netdissect and "
            "compexp: intersection over union",
        ),
        Column("logp_d_given_e", pa.float32(), "log p(d|E), nats; null for labelers without one", True),
        Column("logp_d", pa.float32(), "log p(d), nats; null for labelers without one", True),
        Column("lam", pa.float32(), "λ; null for labelers without one", True),
        Column("n_best", pa.list_(NBEST), "the best labels, best first"),
    ),
    "The label of one unit.",
)

ANNOTATIONS = Noun(
    "annotations",
    ("source", "model", "layer"),
    (
        Column("source", pa.string(), "where the annotations come from, e.g. world or milannotations"),
        _MODEL,
        _LAYER,
        _UNIT,
        Column("annotator", pa.string(), "who wrote it; where that is not known, its place among its unit's"),
        Column("text", pa.string(), "the annotation, as written"),
    ),
    "One person's description of one unit.",
)
