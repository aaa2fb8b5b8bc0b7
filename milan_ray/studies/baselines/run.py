"""The paper's Table 2: labels from concept maps, p(d|E) and wPMI, on networks that the captioner never saw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from milan_ray.config import ExemplarConfig, Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.report import figures
from milan_ray.schema import DESCRIPTIONS, SCORES
from milan_ray.scoring.evaluation import score_table
from milan_ray.stages.captioners import EncoderRef, about_captioner
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import run_encodings
from milan_ray.stages.exemplars import run_exemplars
from milan_ray.storage import CONFIG_KEY, Storage
from milan_ray.studies.baselines import statistics as baselines
from milan_ray.studies.baselines.statistics import LABELERS
from milan_ray.studies.comparison.run import run_comparison
from milan_ray.studies.generalization.run import figure_path
from milan_ray.studies.judges.run import HELD_OUT_SCENES

VERSION = "baselines-1"

NAME = "baselines"
"""Name of the experiment where nobody gives another."""


@dataclass(frozen=True)
class HeldOut:
    """A network, and a captioner that never saw it.

    Attributes:
        model: The network.
        search: How it is described, by which captioner.
        encoder: The captioner's encoder.
    """

    model: references.ModelRef
    search: Search
    encoder: EncoderRef


def run_baselines(
    storage: Storage,
    networks: Sequence[HeldOut],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: LabelConfig,
    resources: Resources,
    *,
    source: str | None = None,
    bert_score: str | Path | None = None,
    name: str = NAME,
    scenes: references.ProbeRef = HELD_OUT_SCENES,
) -> pl.DataFrame:
    """Labels networks by every method, and compares the labels with annotations; does only what is missing.

    Labelers that have labelled all layers of a network before, such as ``dnd`` or ``clip-dissect``, are compared too.

    Args:
        storage: The run directory, which holds annotations of the networks.
        networks: What to label, and with which captioner.
        probe: The probe images, with concept maps.
        config: How to dissect.
        how: How to label from concept maps.
        resources: What of the cluster to use; Ray must be connected.
        source: Whose annotations; None takes the one source there is.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        name: Name of the experiment, which its tables begin with.
        scenes: What the built-in world judges its own networks by.

    Returns:
        Columns model, system, metric, value, low, high, n, note
        (:func:`milan_ray.studies.baselines.statistics.collected`).

    Raises:
        MilanError: A network could not be dissected or labelled, or nobody has annotated it.
    """
    checked_name("an experiment", name, slashes=True)
    models = [network.model for network in networks]
    for network in networks:
        _check_held_out(storage, network)
    done = run_exemplars(storage, models, probe, config, resources)
    failed = dict(done.failed)
    for network in networks:
        if network.model.name in done.models:
            layers = {network.model.name: done.models[network.model.name]}
            run_encodings(storage, layers, network.encoder, resources)
            run_descriptions(storage, layers, network.search, resources)
    failed |= ConceptLabels(done.models, models, probe, config, how).run(storage, resources)
    if failed:
        raise MilanError(" ".join(f"{model}: {reason}" for model, reason in failed.items()))
    comparisons = {}
    for model, layers_of in done.models.items():
        labelers = labelers_of_all(storage, model, layers_of)
        found = run_comparison(
            storage,
            models=[model],
            labelers=labelers,
            source=source,
            bert_score=bert_score,
            name=comparison_name(name, model),
            scenes=scenes,
        )
        comparisons[model] = pl.DataFrame(pl.from_arrow(found))
    rows = baselines.collected(comparisons)
    if "rouge-l-f" not in set(rows["metric"]):
        raise MilanError(
            f"nobody has annotated {', '.join(done.models)}: bring annotations in with jobs.annotations first."
        )
    _publish(storage, name, rows, comparisons)
    return rows


def comparison_name(name: str, model: str) -> str:
    """What the comparison of one network is called."""
    return f"{name} of {model}"


def labelers_of_all(storage: Storage, model: str, layers: Sequence[str]) -> list[str]:
    """The labelers that have labelled all of a model's layers: MILAN's first, then the paper's, then others."""
    found: dict[str, set[str]] = {}
    for keys in storage.partitions(DESCRIPTIONS, model=model):
        found.setdefault(keys["labeler"], set()).add(keys["layer"])
    whole = [labeler for labeler, there in found.items() if there >= set(layers)]
    for labeler in sorted(set(found) - set(whole)):
        say(f"{labeler} has labelled {len(found[labeler])} of {len(layers)} layers of {model}: left out")
    order = [MILAN, LIKELIHOOD, *LABELERS]
    return sorted(whole, key=lambda labeler: (order.index(labeler) if labeler in order else len(order), labeler))


def _check_held_out(storage: Storage, network: HeldOut) -> None:
    """Says where a captioner was trained on the network it is to be judged by."""
    model, decoder = network.model.name, network.search.decoder
    if re.search(rf"(?<![\w/-]){re.escape(model)}(?![\w/-])", about_captioner(storage, decoder)):
        say(
            f"captioner {network.search.name} was trained on annotations of {model}: what it says there is no measure "
            "of what it would say of a network that is new to it",
            level="warning",
        )


def baselines_fingerprint(storage: Storage, comparisons: Mapping[str, pl.DataFrame]) -> Fingerprint:
    """What decides the table of all networks.

    Args:
        storage: The run directory.
        comparisons: Model → rows of its comparison.
    """
    configs = {
        model: {
            experiment: (storage.metadata(SCORES, experiment=experiment) or {}).get(CONFIG_KEY)
            for experiment in found["experiment"].unique().sort()
        }
        for model, found in comparisons.items()
    }
    return Fingerprint.of({"version": VERSION, "comparisons": configs})


def _publish(storage: Storage, name: str, rows: pl.DataFrame, comparisons: Mapping[str, pl.DataFrame]) -> None:
    fingerprint = baselines_fingerprint(storage, comparisons)
    if storage.why(SCORES, fingerprint, experiment=name):
        for ending, picture in figures.files(baselines.draw(rows)).items():
            storage.put(figure_path(storage, name, ending), picture)
        storage.write(SCORES, score_table(name, baselines.score_rows(rows)), fingerprint, experiment=name)
