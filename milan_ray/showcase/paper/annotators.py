"""Appendix A on the built-in world: what its annotators write (the paper's Tables 1, 4 and 5)."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from milan_ray.scoring.text import minilm_directory
from milan_ray.showcase.paper.claims import Claim, Section
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.stages import world
from milan_ray.studies.annotators.run import (
    find_score,
    of_layers,
    of_models,
    run_statistics,
    stored_annotations,
    total,
)
from milan_ray.studies.spacy_pipeline import find_spacy_pipeline
from milan_ray.world.generator import LAYERS
from milan_ray.world.networks import ARCHITECTURES

GENERATOR = "generator"


def run(context: ExperimentContext) -> Section:
    """Counts the world's annotations; says what of the paper's Tables 1, 4 and 5 is the same there."""
    storage = context.storage
    nlp, language = find_spacy_pipeline()
    score, measure = find_score(None if context.small else minilm_directory())
    texts = stored_annotations(storage, world.SOURCE)
    rows = run_statistics(storage, texts, nlp, language, score, measure)
    layers = of_layers(rows)
    networks = outer_layers(layers)
    return Section(
        "annotations",
        "Annotations (paper, Section 3.2 and Appendix A, Tables 1, 4 and 5)",
        (*counts(rows, texts), agreement(rows, measure), *layer_claims(layers, networks, language)),
        tables=(
            (
                f"Networks annotated, and how much annotators agree ({measure}; Tables 1 and 4)",
                of_models(rows).select("model", "units", "texts", "agreement", "low", "high"),
            ),
            (
                f"By layer; words tagged by {language} (Table 5)",
                layers.select("model", "layer", "units", "words", "length", "noun", "adjective", "preposition"),
            ),
        ),
        failures=tuple(_alone(texts)),
        examples=tuple(_examples(texts)),
    )


def outer_layers(layers: pl.DataFrame) -> dict[str, tuple[str, str]]:
    """Per annotated network, its annotated layers nearest to the image and farthest from it: a generator ends there."""
    found = {}
    for (model,), of in layers.group_by(["model"], maintain_order=True):
        short = str(model).removeprefix("world/").split("-")[0]
        every = LAYERS if short == GENERATOR else ARCHITECTURES[short].layers if short in ARCHITECTURES else ()
        there = [layer for layer in every if layer in set(of["layer"])]
        if len(there) > 1:
            found[str(model)] = (there[-1], there[0]) if short == GENERATOR else (there[0], there[-1])
    return found


def counts(rows: pl.DataFrame, texts: pl.DataFrame) -> list[Claim]:
    """Table 1: how much there is."""
    per_unit = texts.group_by("model", "layer", "unit").len()["len"]
    all_of_them = total(rows).row(0, named=True)
    return [
        Claim(
            "Every unit is annotated by three people.",
            "20,272 units of 7 networks, three annotations each (Table 1)",
            f"{all_of_them['units']:,} units of {len(of_models(rows))} networks, {per_unit.min()!r} to "
            f"{per_unit.max()!r} annotations each",
            per_unit.min() == per_unit.max() == 3,
            "the people are the world's three annotators, which are programs",
        )
    ]


def agreement(rows: pl.DataFrame, measure: str) -> Claim:
    """Table 4: how much people agree."""
    models = of_models(rows).drop_nulls("agreement").sort("agreement")
    text = "Some networks have clearer exemplars than others: there annotators agree more."
    paper = "BERTScore .17 (ResNet152-Places365) to .27 (AlexNet-Places365), no intervals (Table 4)"
    if not len(models):
        return Claim(text, paper, "no unit has two annotations", None)
    least, most = models.row(0, named=True), models.row(-1, named=True)

    def shown(row: dict[str, float]) -> str:
        return f"{row['agreement']:.2f} [{row['low']:.2f}, {row['high']:.2f}] ({row['model']})"

    return Claim(
        text,
        paper,
        f"{measure}: {shown(least)} to {shown(most)}",
        least["high"] < most["low"],
        "another measure than the paper's: the figures themselves do not compare",
    )


def layer_claims(layers: pl.DataFrame, networks: dict[str, tuple[str, str]], language: str) -> list[Claim]:
    """Table 5: how layers near the image and far from it differ.

    Args:
        layers: Rows of single layers.
        networks: From :func:`outer_layers`.
        language: What tagged the words.
    """
    at = {(row["model"], row["layer"]): row for row in layers.iter_rows(named=True)}

    def ends(column: str, kinds: Collection[str]) -> dict[str, tuple[float, float]]:
        """Of networks of some kinds, the layers' figures, nearest first."""
        values = {
            model: (at[model, near][column], at[model, far][column])
            for model, (near, far) in networks.items()
            if model.removeprefix("world/").split("-")[0] in kinds
        }
        return {model: pair for model, pair in values.items() if None not in pair}

    found = []
    for text, column, paper, nearer in (
        (
            "Layers closest to the image (early in CNNs, late in generators) are described with more adjectives.",
            "adjective",
            "24.3 % in conv1 and 10.2 % in conv5 of AlexNet-ImageNet, 22.8 % in layer5 and 7.8 % in layer0 of "
            "BigGAN-ImageNet … (Table 5)",
            True,
        ),
        (
            "Layers farther from the image are described with more nouns.",
            "noun",
            "46.0 % in conv5 and 37.5 % in conv1 of AlexNet-ImageNet, 47.6 % in layer4 and 43.8 % in conv1 of "
            "ResNet152-ImageNet (Table 5)",
            False,
        ),
        (
            "Layers farther from the image tend to have longer annotations, but not in all networks.",
            "length",
            "5.5 words in conv5 and 4.8 in conv1 of AlexNet-ImageNet, but 4.6 and 4.7 in ResNet152 (Table 5)",
            False,
        ),
    ):
        values = ends(column, ("cnn", "resnet", GENERATOR))
        shown = "; ".join(f"{model} {near:.1f} and {far:.1f}" for model, (near, far) in values.items())
        same = [near > far if nearer else far > near for near, far in values.values()]
        others = "; ".join(f"{model} {near:.1f} and {far:.1f}" for model, (near, far) in ends(column, ("vit",)).items())
        beside = f"the paper speaks of CNNs and generators here; transformers: {others}" if others else ""
        tagged = "" if column == "length" else f"words are tagged by {language}"
        found.append(
            Claim(
                text,
                paper,
                f"nearest and farthest layer: {shown}" if values else "nothing to compare",
                (sum(same) * 2 > len(same) if column == "length" else all(same)) if values else None,
                "; ".join(filter(None, (tagged, beside))),
            )
        )
    return found


def _alone(texts: pl.DataFrame) -> list[str]:
    """Units of which no two annotators say a common word: the noise that a captioner has to learn from."""
    units = texts.group_by("model", "layer", "unit", maintain_order=True).agg("text")
    apart = [
        row
        for row in units.iter_rows(named=True)
        if len(row["text"]) > 1
        and sum(len(set(text.lower().split())) for text in row["text"])
        == len({word for text in row["text"] for word in text.lower().split()})
    ]
    lines = [f"{len(apart)} of {len(units):,} units have annotations without a single word in common:"]
    step = max(1, len(apart) // 6)
    return lines + [
        f"{row['model']} {row['layer']} {row['unit']}: {' · '.join(row['text'])}" for row in apart[::step][:6]
    ]


def _examples(texts: pl.DataFrame) -> list[str]:
    units = texts.group_by("model", "layer", "unit", maintain_order=True).agg("text")
    some = units.sample(min(8, len(units)), seed=0)
    return [
        f"{row['model']} {row['layer']} {row['unit']}: {' · '.join(row['text'])}" for row in some.iter_rows(named=True)
    ]
