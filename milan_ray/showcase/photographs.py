"""The demo on photographs: a real network over a folder of the user's own, with nothing but what pip installs.

Network, model of images and texts, and concepts are those of the extra ``photos`` (docs/photographs.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.planner import Plan
from milan_ray.engine.references import ModelRef, ProbeRef, probe
from milan_ray.engine.stage import Layers, pairs, run_stages
from milan_ray.errors import MilanError
from milan_ray.labelers.clip_dissect import CLIP_DISSECT, ClipDissect, Similarity
from milan_ray.models.concepts import EVERYDAY, concept_list
from milan_ray.models.conse import NAME as CONSE
from milan_ray.models.conse import minilm_folder
from milan_ray.models.image_text import ImageTextRef
from milan_ray.models.resolve import resolve_model
from milan_ray.models.sentences import SentenceEncoder
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, SCORES, UNIT_SCORES
from milan_ray.scoring.search import scan_descriptions, search_descriptions
from milan_ray.stages.clip_dissect import clip_dissect_stages
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.scores import Described, ScoreConfig, run_scores, score_stages
from milan_ray.storage import Storage
from milan_ray.studies.tables import frame_of

NETWORK = "photos/efficientnet-lite0"

HOLD_OUT = 0.25
"""Share of the photographs that labels are scored on, and not made from."""

FEWEST = 20
"""Photographs below which labels and scores mean nothing."""

EXEMPLAR_CONFIG = ExemplarConfig(pooled=True)

MANY = 300
"""Photographs from which on the 28 that excite a unit most decide its label: a tenth of those that make labels, and
what a reader sees. In smaller folders all photographs decide, by cosines."""

SCORING = ScoreConfig("max", share=HOLD_OUT, top=0.05)

METRICS = {
    "correlation": "correlation of activation and fit",
    "auprc": "average precision for the 5 % that excite the unit most",
    "retrieval-auc": "AUC for the photographs that fit best",
}
"""Metrics that are shown → how."""

CAVEAT = (
    f"The labels come from {CONSE}, a weak stand-in for CLIP: ImageNet's class names, as MiniLM reads them. The same "
    "model judges them, and it sees through the network that is labelled. The scores say that labels hold on "
    "photographs that did not make them, not that they are true."
)
"""What a reader of the labels and scores has to know."""

QUERY, FOUND = "animals", 5
"""What is searched for, by meaning, and how many labels are shown."""


@dataclass(frozen=True)
class Photographs:
    """What the demo made of a folder of photographs.

    Attributes:
        layers: Model → dissected layers.
        scores: Rows of table ``scores``.
        units: Units in all layers.
        labels: Distinct labels.
        found: The labels nearest in meaning to :data:`QUERY`, best first, each with one of its units.
    """

    layers: Layers
    scores: pa.Table
    units: int
    labels: int
    found: pl.DataFrame


def labeler_of(photographs: int) -> ClipDissect:
    """CLIP-Dissect with everyday words, for a number of photographs. Exemplars are ranked by maxima: so are these."""
    similarity: Similarity = "wpmi" if photographs >= MANY else "cos_similarity"
    return ClipDissect(concept_list(EVERYDAY), similarity, "max", HOLD_OUT)


def check_photographs(source: ProbeRef) -> int:
    """Checks that the extra is installed and the folder has photographs, before any work.

    Returns:
        The number of photographs.

    Raises:
        MilanError: A package is missing, or there are too few photographs.
    """
    resolve_model(NETWORK)
    minilm_folder()
    count = len(probe(source).manifest())
    if count < FEWEST:
        raise MilanError(
            f"{', '.join(source.sources)} has {count} photographs: give a folder with at least {FEWEST}; a few hundred "
            "make a good probe."
        )
    return count


def run_photographs(storage: Storage, source: ProbeRef, resources: Resources) -> Photographs:
    """Dissects the network over photographs, labels its units, scores the labels and searches them.

    Everything that is up to date is left as it is.

    Args:
        storage: The run directory.
        source: The photographs.
        resources: The part of the cluster to use; Ray must be connected.
    """
    labeler = labeler_of(check_photographs(source))
    done = Exemplars([ModelRef(NETWORK)], source, EXEMPLAR_CONFIG).run(storage, resources)
    judge = ImageTextRef(CONSE)
    run_stages(clip_dissect_stages(done.models, source, labeler, judge), storage, resources)
    experiments = run_scores(storage, score_stages(_described(done.models), source, judge, SCORING), SCORING, resources)
    scores = pa.concat_tables([storage.read(SCORES, experiment=name) for name in experiments])
    descriptions = scan_descriptions(storage, [NETWORK], labelers=[CLIP_DISSECT])
    units, labels = descriptions.select(pl.len(), pl.col("description").n_unique().alias("labels")).collect().row(0)
    found = search_descriptions(descriptions, QUERY, model=SentenceEncoder(minilm_folder(), "cpu"))
    nearest = found.unique("description", keep="first", maintain_order=True).head(FOUND)
    return Photographs(done.models, scores, units, labels, nearest)


def plan_photographs(storage: Storage, source: ProbeRef) -> Plan:
    """The dry run of :func:`run_photographs`."""
    labeler = labeler_of(check_photographs(source))
    exemplars = Exemplars([ModelRef(NETWORK)], source, EXEMPLAR_CONFIG)
    plan = Plan.of(storage, [exemplars])
    judge = ImageTextRef(CONSE)
    plan.stages(storage, clip_dissect_stages(exemplars.layers, source, labeler, judge))
    if not plan.waits(UNIT_SCORES.name, (CONSE, NETWORK), EXEMPLARS.name, DESCRIPTIONS.name):
        plan.stages(storage, score_stages(_described(exemplars.layers), source, judge, SCORING))
    return plan


def _described(layers: Layers) -> list[Described]:
    return [Described(CLIP_DISSECT, model, layer) for model, layer in pairs(layers)]


def summary(made: Photographs) -> str:
    """The scores beside the trivial baselines, and what the search found, on one screen."""
    rows = frame_of(made.scores)
    lines = []
    for metric, reading in METRICS.items():
        values = rows.filter(metric=metric)
        own, shuffled, constant = (
            _value(values, f"{CLIP_DISSECT}{system}") for system in ("", ", shuffled", ", constant")
        )
        lines.append(f"  {reading}: {own} · shuffled {shuffled} · constant {constant}")
    lines += [f"the labels nearest in meaning to {QUERY!r}:"]
    lines += [f"  {row['layer']} {row['unit']}: {row['description']}" for row in made.found.to_dicts()]
    return "\n".join([*lines, CAVEAT])


def _value(rows: pl.DataFrame, system: str) -> str:
    """A system's mean with its interval."""
    row = rows.filter(system=system).row(0, named=True)
    interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{interval}"
