"""Exemplars, activation levels, views and pooled activations."""

import pyarrow as pa

from milan_ray.schema.table import LAYER, MODEL, UNIT, Column, Table

EXEMPLARS = Table(
    "exemplars",
    ("model", "layer"),
    (
        *UNIT,
        Column("rank", pa.int16(), "0 = the image with the highest activation"),
        Column("image_id", pa.int64(), "row of the probe manifest"),
        Column(
            "activation",
            pa.float32(),
            "the unit's maximum over all positions of this image; NaN where a published set does not say",
        ),
        Column(
            "mask", pa.large_binary(), "H×W bits, row-major, packed big-endian: upsampled map > level; H, W in metadata"
        ),
    ),
    "One of the k images with a unit's highest activations. File metadata: `mask_height`, `mask_width`, `probe`, "
    "`view`, `k`, `quantile`.",
)

LEVELS = Table(
    "levels",
    ("model", "layer"),
    (
        *UNIT,
        Column(
            "level",
            pa.float32(),
            "η: the unit's activation quantile over all positions of all images; NaN when nothing was finite",
        ),
        Column("positions", pa.int64(), "activations counted"),
        Column("nonfinite", pa.int64(), "NaN and infinite activations, left out of everything"),
        Column("exact", pa.bool_(), "whether every position was counted (else a fixed pseudo-random sample)"),
    ),
    "The threshold of one unit's masks.",
)

VIEWS = Table(
    "views",
    ("probe", "view", "block"),
    (
        Column("probe", pa.string(), "digest of the probe manifest"),
        Column("view", pa.string(), "key of the view (resize, crop, interpolation, size)"),
        Column("block", pa.string(), "images block·256 … block·256+255 of the manifest"),
        Column("image_id", pa.int64(), "row of the probe manifest"),
        Column("image", pa.large_binary(), "the view as PNG, RGB, 8 bits"),
    ),
    "An exemplar's image as the model saw it before normalisation, encoded once per image and view.",
)

SKIPPED = Table(
    "skipped",
    ("model",),
    (
        MODEL,
        Column("image_id", pa.int64(), "row of the probe manifest"),
        Column("path", pa.string(), "root/path of the image"),
        Column("reason", pa.string(), "why it was left out"),
    ),
    "A probe image that could not be used.",
)

POOLED = Table(
    "pooled",
    ("model", "layer"),
    (
        *LAYER,
        Column("image_id", pa.int64(), "row of the probe manifest; ascending"),
        Column(
            "max",
            pa.list_(pa.float32()),
            "U activations, unit by unit: the maximum over all positions of this image; NaN where none is finite",
        ),
        Column(
            "mean",
            pa.list_(pa.float32()),
            "U activations, unit by unit: the mean over all finite positions of this image; NaN where there is none",
        ),
    ),
    "Pooled activations of all units of a layer on one readable probe image; only with `--pooled`. Lists, not "
    "fixed-size ones: one query may read layers of different widths. File metadata: `units`, `probe`.",
)

CONTRASTS = Table(
    "contrasts",
    ("encoder", "model", "layer"),
    (
        Column("encoder", pa.string(), "name of the model of images and texts that says which images are alike"),
        *UNIT,
        Column("rank", pa.int16(), "0 = that of the best exemplar; the similar ones first, then the random ones"),
        Column("image_id", pa.int64(), "row of the probe manifest; never an exemplar of the unit"),
        Column("kind", pa.string(), "similar, or random"),
        Column("exemplar", pa.int16(), "rank of the exemplar that it is paired with"),
        Column("similarity", pa.float32(), "product of the embeddings of the two; as a rule a cosine"),
        Column("activation", pa.float32(), "the unit's maximum over all positions of this image"),
        Column("quantile", pa.float32(), "share of the probe's images that excite the unit less"),
    ),
    "One probe image that is like a unit's exemplars and does not excite the unit, or a random one that does not. File "
    "metadata: `quantile`, the criterion; `probe`, `view`.",
)
