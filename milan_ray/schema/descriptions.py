"""Tables from exemplars to texts: encodings, candidates, descriptions, annotations."""

import pyarrow as pa

from milan_ray.schema.table import UNIT, Column, Table

ENCODINGS = Table(
    "encodings",
    ("encoder", "model", "layer"),
    (
        Column("encoder", pa.string(), "registered name of the image encoder"),
        *UNIT,
        Column("rank", pa.int16(), "the exemplar's rank"),
        Column("feature", pa.list_(pa.float32()), "F pooled pyramid features of the masked region; F in metadata"),
    ),
    "Features of one exemplar, as the captioner reads them.",
)

CONTRAST_ENCODINGS = Table(
    "contrast_encodings",
    ("encoder", "model", "layer"),
    (
        Column("encoder", pa.string(), "registered name of the image encoder"),
        *UNIT,
        Column("rank", pa.int16(), "the contrast's rank"),
        Column("feature", pa.list_(pa.float32()), "F pooled pyramid features, as those of encodings; F in metadata"),
    ),
    "Features of one contrast, as the captioner reads them.",
)

IMAGE_EMBEDDINGS = Table(
    "image_embeddings",
    ("encoder", "probe"),
    (
        Column("encoder", pa.string(), "name of the model of images and texts"),
        Column("probe", pa.string(), "digest of the probe manifest"),
        Column("image_id", pa.int64(), "row of the probe manifest; ascending"),
        Column("embedding", pa.list_(pa.float32()), "D numbers; as a rule of length 1"),
    ),
    "One readable probe image as a model of images and texts sees it. File metadata: `width` D.",
)

TEXT_EMBEDDINGS = Table(
    "text_embeddings",
    ("encoder", "texts"),
    (
        Column("encoder", pa.string(), "name of the model of images and texts"),
        Column("texts", pa.string(), "hash of the set of texts"),
        Column("text", pa.string(), "the text; ascending, each once"),
        Column("embedding", pa.list_(pa.float32()), "D numbers; as a rule of length 1"),
    ),
    "One text as a model of images and texts reads it.",
)

CANDIDATES = Table(
    "candidates",
    ("decoder", "model", "layer"),
    (
        Column("decoder", pa.string(), "name of the captioner; with +clip, of its wide search"),
        *UNIT,
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

DESCRIPTIONS = Table(
    "descriptions",
    ("labeler", "model", "layer"),
    (
        Column(
            "labeler",
            pa.string(),
            "which method labelled the unit: milan, milan-pdE, milan-contrast, milan+clip, milan+clip-contrast, "
            "netdissect, compexp, clip-dissect, dnd",
        ),
        *UNIT,
        Column("description", pa.string(), "the label"),
        Column(
            "score",
            pa.float32(),
            "the labeler's own; milan: log p(d|E) − λ·log p(d), nats; milan-contrast: less μ·log p(d|C); milan+clip: a "
            "mean cosine, with -contrast less γ times another; netdissect and compexp: intersection over union; "
            "clip-dissect: its similarity, comparable inside one layer; "
            "dnd: its scoring function's, comparable inside one unit",
        ),
        Column("logp_d_given_e", pa.float32(), "log p(d|E), nats; null for labelers without one", True),
        Column("logp_d", pa.float32(), "log p(d), nats; null for labelers without one", True),
        Column("lam", pa.float32(), "λ; null for labelers without one", True),
        Column(
            "n_best",
            pa.list_(NBEST),
            "the best labels, best first; a captioner's complete descriptions before those that break off",
        ),
    ),
    "The label of one unit.",
)

DRAWINGS = Table(
    "drawings",
    ("labeler", "model", "layer"),
    (
        Column(
            "labeler",
            pa.string(),
            "for which method: dnd, with its tag; dnd-probe where the images were not drawn but found in the probe",
        ),
        *UNIT,
        Column("place", pa.int16(), "0 = the candidate that was proposed first"),
        Column("text", pa.string(), "a candidate label"),
        Column(
            "activations", pa.list_(pa.float32()), "the unit's pooled activation on each image drawn, or found, for it"
        ),
        Column(
            "similarities",
            pa.list_(pa.float32()),
            "each image's mean cosine with the unit's exemplars and crops; null where nothing embedded them",
            True,
        ),
    ),
    "A unit's activations on the images that a generator made, or the probe has, for one candidate label.",
)

ANNOTATIONS = Table(
    "annotations",
    ("source", "model", "layer"),
    (
        Column("source", pa.string(), "where the annotations come from, e.g. world or milannotations"),
        *UNIT,
        Column("annotator", pa.string(), "who wrote it; where that is not known, its place among its unit's"),
        Column("text", pa.string(), "the annotation, as written"),
    ),
    "One person's description of one unit.",
)
