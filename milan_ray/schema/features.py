"""Feature sets that were fitted to a layer, and their customary figures."""

import pyarrow as pa

from milan_ray.schema.table import LAYER, Column, Table

FEATURES_FIT = Table(
    "features_fit",
    ("model", "layer", "features"),
    (
        *LAYER,
        Column("features", pa.string(), "name of the feature set, as in LAYER#NAME"),
        Column("split", pa.string(), "images that were measured: train, or held-out, which the features never saw"),
        Column("method", pa.string(), "pca, nmf, topk-sae or jumprelu-sae"),
        Column("width", pa.int32(), "number of features"),
        Column("k", pa.int32(), "features kept at a position (topk-sae), or aimed at (jumprelu-sae)", True),
        Column("images", pa.int64(), "images behind the figures"),
        Column("positions", pa.int64(), "positions of all images behind the figures"),
        Column("l0", pa.float64(), "mean number of features that are not 0 at a position"),
        Column(
            "explained_variance", pa.float64(), "1 − Σ‖x − x̂‖² / Σ‖x − mean x‖²; null where outputs never vary", True
        ),
        Column("dead", pa.float64(), "share of features that are 0 at all positions"),
        Column("accuracy", pa.float64(), "of the network as it is; null without classes, or of other images", True),
        Column("spliced_accuracy", pa.float64(), "with the layer's output replaced by its reconstruction", True),
        Column("mean_accuracy", pa.float64(), "with the layer's output replaced by its mean over train images", True),
        Column("file", pa.string(), "the file or folder, as --features takes it"),
    ),
    "The figures of a feature set on some images.",
)
