"""What is said of the world's annotations, from figures made up for it."""

from __future__ import annotations

import polars as pl

from milan_ray.showcase.paper.annotators import agreement, counts, layer_claims, outer_layers

LAYERS = [
    # model, layer, noun, adjective, length
    ("world/cnn", "conv1", 50.0, 30.0, 2.0),
    ("world/cnn", "conv4", 60.0, 20.0, 3.0),
    ("world/generator-places", "layer0", 60.0, 20.0, 3.0),
    ("world/generator-places", "layer2", 50.0, 30.0, 4.0),
    ("world/vit", "stem", 50.0, 20.0, 2.0),
    ("world/vit", "blocks.2", 40.0, 30.0, 2.0),
    ("world/planted", "planted", 50.0, 20.0, 2.0),
]


def layers(*rows: tuple[str, str, float | None, float | None, float]) -> pl.DataFrame:
    names = ["model", "layer", "noun", "adjective", "length"]
    return pl.DataFrame(rows, names, orient="row").with_columns(units=pl.lit(1), texts=pl.lit(3))


def test_generators_end_at_the_image() -> None:
    assert outer_layers(layers(*LAYERS)) == {
        "world/cnn": ("conv1", "conv4"),
        "world/generator-places": ("layer2", "layer0"),
        "world/vit": ("stem", "blocks.2"),
    }


def test_claims_on_layers_are_about_what_the_paper_speaks_of() -> None:
    rows = layers(*LAYERS)
    said = layer_claims(rows, outer_layers(rows), "tagger 1")
    assert [claim.reproduced for claim in said] == [True, True, False]  # longer in one of two is no tendency
    assert "world/vit 20.0 and 30.0" in said[0].note and "tagger 1" in said[0].note
    other = layers(("world/cnn", "conv1", None, 10.0, 2.0), ("world/cnn", "conv4", None, 20.0, 3.0))
    said = layer_claims(other, outer_layers(other), "no tagger")
    assert [claim.reproduced for claim in said] == [False, None, True]


def test_agreement_differs_where_intervals_do_not_meet() -> None:
    columns = ["model", "layer", "agreement", "low", "high"]
    rows = pl.DataFrame([("a", "", 0.2, 0.15, 0.25), ("b", "", 0.4, 0.3, 0.5)], columns, orient="row")
    assert agreement(rows, "ROUGE-L").reproduced is True
    assert agreement(rows.with_columns(low=pl.lit(0.1)), "ROUGE-L").reproduced is False
    assert agreement(rows.clear(), "ROUGE-L").reproduced is None


def test_counts_ask_for_three_annotations_everywhere() -> None:
    texts = pl.DataFrame([("a", "l", unit) for unit in (0, 0, 0, 1, 1)], ["model", "layer", "unit"], orient="row")
    rows = pl.DataFrame([("a", "", 2, 5), ("", "", 2, 5)], ["model", "layer", "units", "texts"], orient="row")
    claim = counts(rows, texts)
    assert claim.reproduced is False and "2 units of 1 networks, 2 to 3 annotations each" in claim.ours
