"""Statistics of annotations: number, length, words, and agreement between annotators."""

import pyarrow as pa

from milan_ray.schema.table import Column, Table

ANNOTATION_STATISTICS = Table(
    "annotation_statistics",
    ("source",),
    (
        Column("source", pa.string(), "where the annotations come from"),
        Column("model", pa.string(), "registered name of the model; empty for all together"),
        Column("layer", pa.string(), "module path of the layer; empty for all together"),
        Column("units", pa.int64(), "annotated units"),
        Column("texts", pa.int64(), "annotations"),
        Column("words", pa.int64(), "distinct words: lemmas without punctuation"),
        Column("length", pa.float64(), "mean words per annotation"),
        Column("noun", pa.float64(), "% of words that are nouns; null without a tagger", True),
        Column("adjective", pa.float64(), "% of words that are adjectives; null without a tagger", True),
        Column("preposition", pa.float64(), "% of words that are prepositions; null without a tagger", True),
        Column("agreement", pa.float64(), "mean of each annotation against its unit's others; null without any", True),
        Column("low", pa.float64(), "lower end of its 95 % bootstrap interval over units; null without one", True),
        Column("high", pa.float64(), "upper end of its 95 % bootstrap interval over units; null without one", True),
    ),
    "The annotations of one layer, of one model, or all. File metadata: `language`, what tagged the words; "
    "`score`, what agreement is measured by.",
)
