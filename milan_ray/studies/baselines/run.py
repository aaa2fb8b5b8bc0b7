"""The paper's Table 2: labels from concept maps, p(d|E) and wPMI, on networks that are new to the captioner."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from milan_ray.config import ExemplarConfig, Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.planner import Plan
from milan_ray.engine.stage import Known, Output, ShardedStage, Stage, TaskStage, due, run_stages
from milan_ray.errors import MilanError
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS, EXEMPLARS, SCORES
from milan_ray.scoring.evaluation import score_table
from milan_ray.stages.captioners import EncoderRef, about_captioner, load_captioner
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.descriptions import Search, description_stages
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage
from milan_ray.studies.baselines import statistics as baselines
from milan_ray.studies.baselines.plot import plot_baselines
from milan_ray.studies.baselines.statistics import LABELERS
from milan_ray.studies.comparison.run import Comparison, find_comparison
from milan_ray.studies.judges.run import HELD_OUT_SCENES
from milan_ray.studies.tables import frame_of

VERSION = "baselines-1"

NAME = "baselines"
"""Default name of the experiment."""

LABELLING = tuple(table.name for table in (EXEMPLARS, ENCODINGS, CANDIDATES, DESCRIPTIONS))
"""Tables that a comparison reads, or whose cost it shows: if one is made again, the comparison changes."""


@dataclass(frozen=True)
class HeldOut:
    """A network, and a captioner that was not trained on it.

    Attributes:
        model: The network.
        search: The captioner, and how it describes the network.
        encoder: The captioner's encoder.
    """

    model: references.ModelRef
    search: Search
    encoder: EncoderRef


@dataclass(frozen=True)
class BaselinesJob:
    """Networks to label, and labelers to compare.

    Attributes:
        networks: The networks, each with its captioner.
        probe: The probe images, with concept maps.
        exemplars: Settings of the dissection.
        labels: Settings of labels from concept maps.
        source: Source of the annotations; None uses the only source.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        name: Name of the experiment; names of its tables begin with it.
        scenes: Images by which the built-in world judges its own networks.
    """

    networks: Sequence[HeldOut]
    probe: references.ProbeRef
    exemplars: ExemplarConfig
    labels: LabelConfig
    source: str | None = None
    bert_score: str | Path | None = None
    name: str = NAME
    scenes: references.ProbeRef = HELD_OUT_SCENES

    def __post_init__(self) -> None:
        checked_name("an experiment", self.name, slashes=True)

    @property
    def models(self) -> list[references.ModelRef]:
        """The networks."""
        return [network.model for network in self.networks]

    def comparison_name(self, model: str) -> str:
        """Name of the comparison of one network."""
        return f"{self.name} of {model}"

    def comparison(self, storage: Storage, model: str, layers: Sequence[str]) -> Comparison:
        """The comparison of the labelers that have labelled all layers of a network."""
        return find_comparison(
            storage,
            models=[model],
            labelers=labelers_of_all(storage, model, layers),
            source=self.source,
            bert_score=self.bert_score,
            name=self.comparison_name(model),
            scenes=self.scenes,
        )


@dataclass(frozen=True)
class BaselinesTable(Stage):
    """The table of all networks.

    Attributes:
        job: The experiment.
        comparisons: Model → its comparison, which is up to date.
    """

    table, name, title = SCORES, "baselines", "baselines"

    job: BaselinesJob
    comparisons: Mapping[str, Comparison]

    def outputs(self, known: Known) -> Iterator[Output]:
        """The table, determined by the tables of the comparisons."""
        configs = {}
        for model, comparison in self.comparisons.items():
            experiments = sorted(set(comparison.stored(known.storage)["experiment"].to_pylist()))
            configs[model] = {name: known.config(SCORES, experiment=name) for name in experiments}
        fingerprint = Fingerprint.of({"version": VERSION, "comparisons": configs})
        yield Output({"experiment": self.job.name}, fingerprint)


def plan_baselines(storage: Storage, job: BaselinesJob) -> Plan:
    """The dry run of :func:`run_baselines`."""
    plan = Plan()
    exemplars = Exemplars(job.models, job.probe, job.exemplars)
    plan.stages(storage, [exemplars])
    for network in job.networks:
        plan.stages(storage, _describing(storage, network, exemplars.layers))
    plan.stages(storage, [ConceptLabels(exemplars.layers, job.models, job.probe, job.exemplars, job.labels)])
    comparisons: dict[str, Comparison] = {}
    for model, layers in exemplars.layers.items():
        if not plan.waits(SCORES.name, (job.comparison_name(model),), *LABELLING, of=model):
            comparisons[model] = job.comparison(storage, model, layers)
            plan.stages(storage, [comparisons[model]])
    if not plan.waits(SCORES.name, (job.name,), SCORES.name):
        plan.stages(storage, [BaselinesTable(job, comparisons)])
    return plan


def run_baselines(storage: Storage, job: BaselinesJob, resources: Resources) -> pl.DataFrame:
    """Labels networks by every method, and compares the labels with annotations; makes only what is missing or stale.

    Other labelers that have labelled all layers of a network, such as ``dnd`` or ``clip-dissect``, are compared too.

    Args:
        storage: The run directory, which holds annotations of the networks.
        job: The experiment.
        resources: The part of the cluster to use; Ray must be connected.

    Returns:
        Columns model, system, metric, value, low, high, n, note
        (:func:`milan_ray.studies.baselines.statistics.collected`).

    Raises:
        MilanError: A network could not be dissected or labelled, or has no annotations.
    """
    for network in job.networks:
        _check_held_out(storage, network)
    done = Exemplars(job.models, job.probe, job.exemplars).run(storage, resources)
    for network in job.networks:
        run_stages(_describing(storage, network, done.models), storage, resources)
    labels = ConceptLabels(done.models, job.models, job.probe, job.exemplars, job.labels)
    failed = done.failed | labels.run(storage, resources)
    if failed:
        raise MilanError(" ".join(f"{model}: {reason}" for model, reason in failed.items()))
    comparisons, tables = {}, {}
    for model, layers in done.models.items():
        comparisons[model] = job.comparison(storage, model, layers)
        tables[model] = frame_of(comparisons[model].run(storage))
    rows = baselines.collected(tables)
    if "rouge-l-f" not in set(rows["metric"]):
        raise MilanError(
            f"nobody has annotated {', '.join(done.models)}: bring annotations in with jobs.annotations first."
        )
    for output in due(BaselinesTable(job, comparisons), storage):
        store_figure(storage, SCORES, plot_baselines(rows), **output.keys)
        scores = score_table(job.name, baselines.score_rows(rows))
        storage.write(SCORES, scores, output.fingerprint, **output.keys)
    return rows


def _describing(
    storage: Storage, network: HeldOut, layers: Mapping[str, Sequence[str]]
) -> list[ShardedStage | TaskStage]:
    """The stages that describe a network if it is among the dissected ones, which are given with their layers."""
    if network.model.name not in layers:
        return []
    own = {network.model.name: layers[network.model.name]}
    captioner = load_captioner(storage, network.search.decoder)
    return [Encodings(own, network.encoder), *description_stages(own, network.search, captioner)]


def labelers_of_all(storage: Storage, model: str, layers: Sequence[str]) -> list[str]:
    """The labelers that have labelled all of a model's layers: MILAN's first, then the paper's, then others."""
    labelled: dict[str, set[str]] = {}
    for keys in storage.partitions(DESCRIPTIONS, model=model):
        labelled.setdefault(keys["labeler"], set()).add(keys["layer"])
    complete = [labeler for labeler, done in labelled.items() if done >= set(layers)]
    for labeler in sorted(set(labelled) - set(complete)):
        say(f"{labeler} has labelled {len(labelled[labeler])} of {len(layers)} layers of {model}: left out")
    order = [MILAN, LIKELIHOOD, *LABELERS]
    return sorted(complete, key=lambda labeler: (order.index(labeler) if labeler in order else len(order), labeler))


def _check_held_out(storage: Storage, network: HeldOut) -> None:
    """Warns if a captioner was trained on the network that it describes."""
    model, decoder = network.model.name, network.search.decoder
    if re.search(rf"(?<![\w/-]){re.escape(model)}(?![\w/-])", about_captioner(storage, decoder)):
        say(
            f"captioner {network.search.name} was trained on annotations of {model}: what it says there is no measure "
            "of what it would say of a network that is new to it",
            level="warning",
        )
