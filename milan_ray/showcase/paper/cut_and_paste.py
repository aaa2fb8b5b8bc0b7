"""Appendix D on the built-in world: adversarial images for units described with very different words."""

from __future__ import annotations

import polars as pl

from milan_ray.engine import references
from milan_ray.report.figures import figure_path
from milan_ray.schema import PASTED
from milan_ray.scoring.bootstrap import Interval
from milan_ray.showcase.paper.claims import Claim, Section, evidence
from milan_ray.showcase.paper.experiment_context import FEW_SCENES, ExperimentContext
from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig
from milan_ray.studies.cut_and_paste.statistics import DIFFERENT, OTHERS, between_groups, rates
from milan_ray.studies.judges.run import HELD_OUT_SCENES
from milan_ray.studies.spacy_pipeline import find_spacy_pipeline

NAME = "cut-and-paste"

MODELS = ("world/resnet", "world/cnn")
"""Classifiers of objects whose last layer reads a described layer; the captioner was not trained on the first."""

CONFIG = CutAndPasteConfig(units=40, originals=8, distractors=15)
SMALL = CutAndPasteConfig(units=12, originals=2, distractors=15)


def run(context: ExperimentContext) -> Section:
    """Pastes what units respond to into scenes that they are silent on, for the claims of the paper's Appendix D."""
    storage = context.storage
    name = context.experiment(NAME)
    scenes = FEW_SCENES if context.small else HELD_OUT_SCENES
    nlp, language = find_spacy_pipeline()
    models = MODELS[:1] if context.small else MODELS
    config = SMALL if context.small else CONFIG
    studies = [CutAndPaste(references.ModelRef(model), scenes, language, config, name) for model in models]
    pairs = pl.concat(study.run(storage, nlp, context.resources) for study in studies)
    # Units of several networks, told apart by their layers' names.
    pairs = pairs.with_columns(pl.concat_str("model", "layer", separator=" ").alias("layer"))
    return Section(
        NAME,
        "Cut-and-paste adversarial images (paper, Appendix D, Figure 14)",
        tuple(claims(pairs, language)),
        tuple(figure_path(storage, PASTED, experiment=name, model=model) for model in models),
        (evidence("Share of images with something pasted on that are taken for a class of the unit's", table(pairs)),),
        _examples(pairs.filter((pl.col("group") == DIFFERENT) & ~pl.col("fooled"))),
        _examples(pairs.filter((pl.col("group") == DIFFERENT) & pl.col("fooled"))),
    )


def claims(pairs: pl.DataFrame, language: str) -> list[Claim]:
    """Compares the claims of Appendix D with the results.

    Args:
        pairs: Rows of schema PASTED.
        language: Name of the spaCy pipeline that read the descriptions.
    """
    groups = rates(pairs)
    note = (
        "Only exemplars that are taken for none of the unit's classes: with twelve classes few are left. Word "
        f"differences by {language}."
    )
    results = []
    if different := groups.get(DIFFERENT):
        results.append(
            Claim(
                "What a unit described with very different words fires at, pasted where it does not belong, makes the "
                "network see a class that the unit speaks for and that neither image shows.",
                "three images for one unit, “animals, vehicles, and vases” (Figure 14; no rate)",
                f"{_percent(different['fooled'])} of images pasted on; the same cut from images that the unit is "
                f"silent on: {_percent(different['control'])}; difference {_percent(different['beyond control'])}",
                different["beyond control"].low > 0,
                note,
            )
        )
    if DIFFERENT in groups and OTHERS in groups:
        more = between_groups(pairs)
        results.append(
            Claim(
                "Units described with very different words are less robust than others.",
                "a hypothesis, for which Figure 14 is “some evidence” (Appendix D)",
                f"beyond the control, {_percent(groups[DIFFERENT]['beyond control'])} for them and "
                f"{_percent(groups[OTHERS]['beyond control'])} for other units: difference {_percent(more)}",
                more.low > 0,
                note,
            )
        )
    return results


def table(pairs: pl.DataFrame) -> pl.DataFrame:
    """A row per group of units and outcome."""
    return pl.DataFrame(
        [
            {"units": group, "outcome": outcome, "share": value.value, "low": value.low, "high": value.high}
            for group, outcomes in rates(pairs).items()
            for outcome, value in outcomes.items()
        ]
    )


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _examples(pairs: pl.DataFrame, count: int = 8) -> tuple[str, ...]:
    chosen = pairs.sample(min(count, len(pairs)), seed=0, shuffle=True)
    return tuple(
        f"{row['layer']} {row['unit']} “{row['description']}”, which speaks for {', '.join(row['targets'])}: from "
        f"{row['distractor_class']} on {row['original_class']}, taken for {row['predicted']}"
        for row in chosen.iter_rows(named=True)
    )
