from __future__ import annotations

import polars as pl
import pytest

from milan_ray.errors import MilanError
from milan_ray.studies.auditing.statistics import (
    FACE_WORDS,
    compare_sides,
    count_pairs,
    find_units,
    pair_models,
    read_review,
    reviewed,
    summary,
    write_review,
)

NAMES = ["resnet18/imagenet", "resnet18/imagenet-blurred", "alexnet/imagenet", "alexnet/imagenet-blurred", "vit/other"]


def test_pairs_differ_by_the_suffix() -> None:
    both = [("alexnet/imagenet", "alexnet/imagenet-blurred"), ("resnet18/imagenet", "resnet18/imagenet-blurred")]
    assert pair_models(NAMES) == both
    assert pair_models(NAMES, patterns=["resnet*"]) == both[1:]
    assert pair_models(NAMES, patterns=["imagenet", "imagenet-blurred"]) == both
    assert pair_models(["a", "a+b"], "+b") == [("a", "a+b")]


def test_no_pair_is_one_sentence() -> None:
    with pytest.raises(MilanError, match="called NAME and NAME-masked"):
        pair_models(NAMES, "-masked")
    with pytest.raises(MilanError, match="unknown model with descriptions 'vgg'"):
        pair_models(NAMES, patterns=["vgg"])


def test_words_are_found_in_any_form_as_whole_words() -> None:
    texts = ["Human faces", "a dog's head", "headlights", "an eye", "typeface", "mouths and noses", ""]
    found = find_units(pl.DataFrame({"unit": range(7), "description": texts}), FACE_WORDS)
    assert dict(found.select("unit", "words").iter_rows()) == {
        0: ["face"],
        1: ["head"],
        3: ["eyes"],
        5: ["nose", "mouth"],
    }


def unit(number: int, text: str = "faces", exemplars: str = "x") -> dict[str, object]:
    return {
        "model": "m",
        "layer": "l",
        "unit": number,
        "description": text,
        "exemplars": exemplars,
        "card": f"#{number}",
    }


def test_review_keeps_what_people_wrote_and_adds_what_is_new() -> None:
    first, new = reviewed(pl.DataFrame([unit(1), unit(2, 'a "face", red')]), None)
    assert first["verdict"].to_list() == ["", ""]
    text = write_review(new).replace('l,2,"a ""face"", red",,', 'l,2,"a ""face"", red",Reject,a flag')
    text = "\ufeff" + text.replace("\n", ",seen by\n", 1).removesuffix("\n")  # another column, no line end
    again = read_review(text, "review.csv")
    assert again["verdict"].to_list() == ["", "reject"]
    second, new = reviewed(pl.DataFrame([unit(2, 'a "face", red'), unit(3), unit(1, "eyes")]), again)
    assert second.select("unit", "verdict", "note").rows() == [(2, "reject", "a flag"), (3, "", ""), (1, "", "")]
    assert new.select("unit", "description").rows() == [(3, "faces"), (1, "eyes")]
    longer = write_review(new, text)
    assert longer.startswith(text + "\n") and longer.endswith("m,l,3,faces,,,#3,x,\nm,l,1,eyes,,,#1,x,\n")
    assert read_review(longer, "review.csv")["unit"].to_list() == [1, 2, 3, 1]
    other, _ = reviewed(pl.DataFrame([unit(2, 'a "face", red', "y")]), again)
    assert other["verdict"].to_list() == [""]  # other exemplars: nobody has seen these


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("verdict", "votes"), "no column verdict"),
        (lambda text: text.replace("faces,", "faces,maybe"), "line 2: unit '1' with verdict 'maybe'"),
        (lambda text: text.replace("l,1,", "l,one,"), "unit 'one'"),
        (lambda text: text + "m,l,1,faces,reject,,#1,x\n", "different verdicts on m l 1"),
    ],
)
def test_damaged_review_is_one_sentence(change, message: str) -> None:
    _, file = reviewed(pl.DataFrame([unit(1)]), None)
    with pytest.raises(MilanError, match=message):
        read_review(change(write_review(file)), "review.csv")


def test_counts_leave_out_what_was_rejected() -> None:
    units = pl.DataFrame(
        {"model": ["a", "a", "a", "b", "c"], "verdict": ["accept", "reject", "", "", "reject"]},
    )
    counts = count_pairs([("a", "b"), ("c", "d")], units, {"a": 10, "b": 10, "c": 5, "d": 6})
    assert counts.select("units", "of", "rejected", "unreviewed").rows() == [(2, 10, 1, 1), (0, 5, 1, 0)]
    assert counts.select("other_units", "other_of", "other_rejected", "other_unreviewed").rows() == [
        (1, 10, 0, 1),
        (0, 6, 0, 0),
    ]


def test_sides_are_compared_pair_by_pair() -> None:
    names = [f"n{number}" for number in range(6)]
    plain, blurred = [8, 3, 5, 9, 12, 4], [5, 1, 4, 5, 7, 3]
    units = pl.DataFrame(
        {
            "model": [name for name, n in zip(names, plain, strict=True) for _ in range(n)]
            + [f"{name}b" for name, n in zip(names, blurred, strict=True) for _ in range(n)],
        }
    ).with_columns(pl.lit("").alias("verdict"))
    pairs = [(name, f"{name}b") for name in names]
    counts = count_pairs(pairs, units, {name: 100 for pair in pairs for name in pair})
    rows = {(system, metric): value for system, metric, value, *_ in compare_sides(counts)}
    gap = rows["unblurred − blurred", "units per network"]
    assert gap.value == pytest.approx(16 / 6) and 1 <= gap.low < gap.value < gap.high <= 5
    assert rows["unblurred", "share of units"].value == pytest.approx(41 / 600)
    assert rows["unblurred − blurred", "p (signed ranks)"].value == pytest.approx(2**-5)
    assert rows["unblurred − blurred", "p (signs)"].value == pytest.approx(2**-5)
    said = summary(counts, compare_sides(counts))
    assert (
        "41 units in 6 unblurred networks, 25 in 6 blurred ones" in said
        and "not looked at yet, and counted: 66" in said
    )
