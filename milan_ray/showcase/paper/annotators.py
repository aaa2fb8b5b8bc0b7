"""Appendix A on the built-in world: its annotators' texts (the paper's Tables 1, 4 and 5)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import polars as pl

from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.text import minilm_directory
from milan_ray.showcase.paper.claims import Claim, Section, evidence, shown
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
    """Computes statistics of the world's annotations, for the claims on the paper's Tables 1, 4 and 5."""
    storage = context.storage
    nlp, language = find_spacy_pipeline()
    score, measure = find_score(None if context.small else minilm_directory())
    texts = stored_annotations(storage, world.SOURCE)
    rows = run_statistics(storage, texts, nlp, language, score, measure)
    layers = of_layers(rows)
    units = texts.group_by("model", "layer", "unit", maintain_order=True).agg("text")
    agreements = of_models(rows).select("model", "units", "texts", "agreement", "low", "high")
    words = layers.select("model", "layer", "units", "words", "length", "noun", "adjective", "preposition")
    return Section(
        "annotations",
        "Annotations (paper, Section 3.2 and Appendix A, Tables 1, 4 and 5)",
        (counts(rows, texts), agreement(rows, measure), *layer_claims(layers, outer_layers(layers), language)),
        tables=(
            evidence(f"Networks annotated, and how much annotators agree ({measure}; Tables 1 and 4)", agreements),
            evidence(f"By layer; words tagged by {language} (Table 5)", words),
        ),
        failures=_apart(units),
        examples=_lines(units.sample(min(8, len(units)), seed=0)),
    )


def outer_layers(layers: pl.DataFrame) -> dict[str, tuple[str, str]]:
    """Annotated network → its layers nearest to the image and farthest from it; a generator's last layer is nearest."""
    outer = {}
    for (model,), rows in layers.group_by(["model"], maintain_order=True):
        kind = _kind(str(model))
        every = LAYERS if kind == GENERATOR else ARCHITECTURES[kind].layers if kind in ARCHITECTURES else ()
        annotated = [layer for layer in every if layer in set(rows["layer"])]
        if len(annotated) > 1:
            outer[str(model)] = (annotated[-1], annotated[0]) if kind == GENERATOR else (annotated[0], annotated[-1])
    return outer


def _kind(model: str) -> str:
    """Architecture of one of the world's networks."""
    return model.removeprefix("world/").split("-")[0]


def counts(rows: pl.DataFrame, texts: pl.DataFrame) -> Claim:
    """Table 1: the numbers of units and annotations."""
    per_unit = texts.group_by("model", "layer", "unit").len()["len"]
    units = total(rows)["units"].item()
    return Claim(
        "Every unit is annotated by three people.",
        "20,272 units of 7 networks, three annotations each (Table 1)",
        f"{units:,} units of {len(of_models(rows))} networks, {per_unit.min()!r} to {per_unit.max()!r} annotations "
        "each",
        per_unit.min() == per_unit.max() == 3,
        "the people are the world's three annotators, which are programs",
    )


def agreement(rows: pl.DataFrame, measure: str) -> Claim:
    """Table 4: the agreement of annotators."""
    models = of_models(rows).drop_nulls("agreement").sort("agreement")
    text = "Some networks have clearer exemplars than others: there annotators agree more."
    paper = "BERTScore .17 (ResNet152-Places365) to .27 (AlexNet-Places365), no intervals (Table 4)"
    if not len(models):
        return Claim(text, paper, "no unit has two annotations", None)
    least, most = models.row(0, named=True), models.row(-1, named=True)

    def of_model(row: dict[str, Any]) -> str:
        return f"{shown(Interval(row['agreement'], row['low'], row['high']))} ({row['model']})"

    return Claim(
        text,
        paper,
        f"{measure}: {of_model(least)} to {of_model(most)}",
        least["high"] < most["low"],
        "another measure than the paper's: the figures themselves do not compare",
    )


def layer_claims(layers: pl.DataFrame, networks: dict[str, tuple[str, str]], language: str) -> list[Claim]:
    """Table 5: differences between layers near the image and far from it.

    Args:
        layers: Rows of single layers.
        networks: From :func:`outer_layers`.
        language: Name of the spaCy pipeline that tagged the words.
    """
    at = {(row["model"], row["layer"]): row for row in layers.iter_rows(named=True)}

    def ends(column: str, kinds: Collection[str]) -> dict[str, tuple[float, float]]:
        """Values of the nearest and the farthest layer of networks of some kinds."""
        values = {
            model: (at[model, near][column], at[model, far][column])
            for model, (near, far) in networks.items()
            if _kind(model) in kinds
        }
        return {model: pair for model, pair in values.items() if None not in pair}

    results = []
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
        pairs = "; ".join(f"{model} {near:.1f} and {far:.1f}" for model, (near, far) in values.items())
        same = [near > far if nearer else far > near for near, far in values.values()]
        others = "; ".join(f"{model} {near:.1f} and {far:.1f}" for model, (near, far) in ends(column, ("vit",)).items())
        beside = f"the paper speaks of CNNs and generators here; transformers: {others}" if others else ""
        tagged = "" if column == "length" else f"words are tagged by {language}"
        results.append(
            Claim(
                text,
                paper,
                f"nearest and farthest layer: {pairs}" if values else "nothing to compare",
                (sum(same) * 2 > len(same) if column == "length" else all(same)) if values else None,
                "; ".join(filter(None, (tagged, beside))),
            )
        )
    return results


def _lines(units: pl.DataFrame) -> tuple[str, ...]:
    """Units with their annotations, as lines of text."""
    return tuple(f"{row['model']} {row['layer']} {row['unit']}: {' · '.join(row['text'])}" for row in units.to_dicts())


def _apart(units: pl.DataFrame) -> tuple[str, ...]:
    """Units whose annotations have no word in common, which show the noise of the training data."""

    def no_common_word(texts: pl.Series) -> bool:
        words = [set(text.lower().split()) for text in texts]
        return len(words) > 1 and sum(map(len, words)) == len(set().union(*words))

    apart = units.filter([no_common_word(texts) for texts in units["text"]])
    first = f"{len(apart)} of {len(units):,} units have annotations without a single word in common:"
    return (first, *_lines(apart[:: max(1, len(apart) // 6)].head(6)))
