"""Ratings of descriptions by people: which images they are asked about, what they said, and the scores that follow."""

import pyarrow as pa

from milan_ray.schema.table import Column, Table

RATING_DRAWS = Table(
    "rating_draws",
    ("labeler", "model", "layer"),
    (
        Column("labeler", pa.string(), "whose description is rated"),
        Column("model", pa.string(), "registered name of the model"),
        Column("layer", pa.string(), "module path of the layer"),
        Column("unit", pa.int32(), "channel"),
        Column("description", pa.string(), "what raters look for"),
        Column("image_id", pa.int64(), "row in the probe manifest; an image drawn twice has two rows"),
        Column("weight", pa.float64(), "1 / (N·q), N images, drawn with probability q"),
        Column("activation", pa.float64(), "the unit's value on the image, as pooled"),
        Column("top", pa.bool_(), "whether the image is among those that count as exciting the unit"),
        Column("calibration", pa.list_(pa.float64()), "features whose mean over the N images is 0"),
        Column("prior", pa.list_(pa.float64()), "features that presence is predicted from; standardised"),
    ),
    "One draw of an image for one description, by unit and image. File metadata: `probe`, digest of the manifest; "
    "`sampling`, how images are drawn.",
)

RATINGS = Table(
    "ratings",
    ("source",),
    (
        Column("source", pa.string(), "where the ratings come from"),
        Column("labeler", pa.string(), "whose description was rated"),
        Column("model", pa.string(), "registered name of the model"),
        Column("layer", pa.string(), "module path of the layer"),
        Column("unit", pa.int32(), "channel"),
        Column("image_id", pa.int64(), "row in the probe manifest"),
        Column("rater", pa.string(), "pseudonym of the person"),
        Column("yes", pa.bool_(), "whether the person found what the description names"),
    ),
    "One person's answer on one image and one description.",
)

RATED_SCORES = Table(
    "rated_scores",
    ("source",),
    (
        Column("source", pa.string(), "where the ratings come from"),
        Column("labeler", pa.string(), "whose description was rated"),
        Column("model", pa.string(), "registered name of the model"),
        Column("layer", pa.string(), "module path of the layer"),
        Column("unit", pa.int32(), "channel"),
        Column("description", pa.string(), "what raters looked for"),
        Column("metric", pa.string(), "`correlation`, `precision`, `recall`, `f1` or `iou`"),
        Column("value", pa.float64(), "the estimate for the whole probe"),
        Column("low", pa.float64(), "lower end of its 95 % interval, over draws and what raters leave open"),
        Column("high", pa.float64(), "upper end of its 95 % interval"),
        Column("draws", pa.int64(), "draws that the score is computed from"),
        Column("images", pa.int64(), "distinct images that were rated"),
        Column("ratings", pa.int64(), "answers"),
    ),
    "A score of one description by people's ratings. File metadata: `raters`, JSON of each person's sensitivity and "
    "specificity, as means of the posterior.",
)
