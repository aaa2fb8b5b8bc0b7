"""What an experiment would do, and why: its own fingerprints beside the storage, as :mod:`milan_ray.stages.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import references
from milan_ray.engine.planner import Plan, Planned, Step
from milan_ray.probe.manifest import digest
from milan_ray.schema import (
    ABLATIONS,
    AUDITS,
    CANDIDATES,
    DESCRIPTIONS,
    ENCODINGS,
    EXEMPLARS,
    GENERALIZATION,
    HELD_OUT,
    PASTED,
    SCORES,
    SPLITS,
    TRAINING,
)
from milan_ray.stages.captioners import load_captioner
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.descriptions import description_stages
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.training import Training
from milan_ray.storage import Storage
from milan_ray.studies.analysis.run import AnalysisConfig, analysis_fingerprint, described_model
from milan_ray.studies.auditing.run import AuditConfig, find_audit
from milan_ray.studies.auditing.statistics import Pair
from milan_ray.studies.baselines.run import HeldOut, baselines_fingerprint, comparison_name, labelers_of_all
from milan_ray.studies.comparison.run import Comparison, find_comparison
from milan_ray.studies.cut_and_paste.run import PastingConfig, pasting_fingerprint
from milan_ray.studies.editing.run import EditingConfig, editing_fingerprint, splits, tuned_name, unwanted_units
from milan_ray.studies.generalization.run import (
    GeneralizationJob,
    find_trials,
    held_out_fingerprint,
    scores_fingerprint,
    split_fingerprint,
    split_units,
)
from milan_ray.studies.judges.run import HELD_OUT_SCENES

LABELLING = tuple(noun.name for noun in (EXEMPLARS, ENCODINGS, CANDIDATES, DESCRIPTIONS))
"""What a comparison reads, labels or what they cost: that of stages made again is another."""

ANEW = "made anew by every run"
"""The reason of what is kept nowhere to go on from."""


def plan_analysis(
    storage: Storage,
    plan: Plan,
    model: references.ModelRef,
    probe: references.ProbeRef,
    language: str,
    config: AnalysisConfig,
    name: str = "analysis",
) -> None:
    """Adds the plan of :func:`milan_ray.studies.analysis.run.run_analysis`; arguments and errors as there."""
    spec, layers = described_model(storage, model, config.labeler)
    fingerprint = analysis_fingerprint(storage, spec, layers, _digest(probe), language, config)
    plan.add(storage, ABLATIONS, fingerprint, experiment=name, model=spec.name)


def plan_editing(
    storage: Storage,
    plan: Plan,
    model: references.ModelRef,
    validation: references.ProbeRef,
    test: references.ProbeRef | None,
    config: EditingConfig,
    tuned: bool,
    name: str = "editing",
) -> None:
    """Adds the plan of :func:`milan_ray.studies.editing.run.run_editing`; arguments and errors as there.

    Args:
        storage: The run directory.
        plan: What is planned already.
        model: The classifier.
        validation: Images that order units.
        test: Images that judge; None for none.
        config: How.
        tuned: Whether the last layer is fine-tuned then.
        name: Name of the experiment in the tables.
    """
    spec, layers = described_model(storage, model, config.labeler)
    unwanted_units(storage, spec.name, layers, config)
    digests = {split: _digest(probe) for split, probe in splits(validation, test).items()}
    fingerprint = editing_fingerprint(storage, spec, layers, digests, config)
    plan.add(storage, ABLATIONS, fingerprint, experiment=name, model=spec.name)
    if tuned:
        plan.steps.append(Step(ABLATIONS.name, (tuned_name(name), spec.name), ANEW))


def plan_pasting(
    storage: Storage,
    plan: Plan,
    model: references.ModelRef,
    probe: references.ProbeRef,
    language: str,
    config: PastingConfig,
    name: str = "cut-and-paste",
) -> None:
    """Adds the plan of :func:`milan_ray.studies.cut_and_paste.run.run_pasting`; arguments and errors as there."""
    spec, layers = described_model(storage, model, config.labeler)
    fingerprint, _, _ = pasting_fingerprint(storage, spec, layers, probe, _digest(probe), language, config)
    plan.add(storage, PASTED, fingerprint, experiment=name, model=spec.name)


def plan_generalization(storage: Storage, job: GeneralizationJob, language: str, resources: Resources) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.studies.generalization.run.run_generalization`.

    Raises:
        MilanError: Exemplars or annotations are missing or do not belong together, or a split has too few units.
    """
    plan = Plan()
    plan.stages(storage, [Encodings(job.layers, job.encoder)])
    stages = (SPLITS, TRAINING, HELD_OUT, GENERALIZATION, SCORES)
    waiting = [plan.waits(noun.name, (job.name,), ENCODINGS.name) for noun in stages]  # which say what units count
    if any(waiting):
        return plan
    trials = find_trials(storage, job, resources)
    for split in job.splits:
        plan.add(storage, SPLITS, split_units(trials, split.name)[1], experiment=job.name, split=split.name)
    said: dict[str, list[str]] = {split.name: [] for split in job.splits}
    for trial in trials:
        plan.stages(storage, [Training(trial.training)])
        captioner = Planned(storage, plan).config(TRAINING, decoder=trial.training.name)
        fingerprint = held_out_fingerprint(storage, job, trial, captioner)
        plan.add(storage, HELD_OUT, fingerprint, **trial.public(job.name))
        said[trial.split.name].append(fingerprint.hash)
    scored = {name: split_fingerprint(job, language, hashes) for name, hashes in said.items()}
    for name, fingerprint in scored.items():
        plan.add(storage, GENERALIZATION, fingerprint, experiment=job.name, split=name)
    plan.add(
        storage, SCORES, scores_fingerprint([fingerprint.hash for fingerprint in scored.values()]), experiment=job.name
    )
    return plan


def plan_baselines(
    storage: Storage,
    networks: Sequence[HeldOut],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: LabelConfig,
    *,
    source: str | None = None,
    bert_score: str | Path | None = None,
    name: str,
    scenes: references.ProbeRef = HELD_OUT_SCENES,
) -> Plan:
    """The plan of :func:`milan_ray.studies.baselines.run.run_baselines`; arguments and errors as there."""
    models = [network.model for network in networks]
    exemplars = Exemplars(models, probe, config)
    plan = Plan.of(storage, [exemplars])
    every = exemplars.layers
    for network in networks:
        mine = {model: layers for model, layers in every.items() if model == network.model.name}
        captioner = load_captioner(storage, network.search.decoder)
        plan.stages(storage, [Encodings(mine, network.encoder)])
        plan.stages(storage, description_stages(mine, network.search, captioner))
    plan.stages(storage, [ConceptLabels(every, models, probe, config, how)])
    comparisons: dict[str, pl.DataFrame] = {}
    for model, layers in every.items():
        whole = comparison_name(name, model)
        if plan.waits(SCORES.name, (whole,), *LABELLING, of=model):
            continue
        labelers = labelers_of_all(storage, model, layers)
        found = find_comparison(
            storage, models=[model], labelers=labelers, source=source, bert_score=bert_score, name=whole, scenes=scenes
        )
        plan.steps.append(comparison_step(storage, found))
        if not plan.steps[-1].reason:
            comparisons[model] = pl.DataFrame(pl.from_arrow(found.stored(storage)))
    if not plan.waits(SCORES.name, (name,), SCORES.name):
        plan.add(storage, SCORES, baselines_fingerprint(storage, comparisons), experiment=name)
    return plan


def plan_comparison(storage: Storage, comparison: Comparison) -> Plan:
    """The plan of :func:`milan_ray.studies.comparison.run.run_comparison`."""
    return Plan([comparison_step(storage, comparison)])


def comparison_step(storage: Storage, comparison: Comparison) -> Step:
    """The step of a comparison."""
    about = f"{', '.join(comparison.systems)} on {len(comparison.units)} units"
    reason = comparison.why(storage)
    return Step(SCORES.name, (comparison.name,), reason and f"{about}: {reason}")


def plan_audit(storage: Storage, plan: Plan, pairs: Sequence[Pair], config: AuditConfig) -> None:
    """Adds the plan of :func:`milan_ray.studies.auditing.run.run_audit`; arguments and errors as there."""
    reason = find_audit(storage, pairs, config).why(storage, config.name)
    plan.steps.append(Step(AUDITS.name, (config.name,), reason))


def _digest(probe: references.ProbeRef) -> str:
    return digest(references.probe(probe).manifest())
