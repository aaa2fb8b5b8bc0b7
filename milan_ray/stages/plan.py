"""What a job would do, and why: the stages' own fingerprints beside the storage. Starts no Ray, writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from milan_ray.config import ExemplarConfig
from milan_ray.engine import references
from milan_ray.engine.planner import Plan, Step
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import check_probe
from milan_ray.labelers.clip_dissect import ClipDissect
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.schema import (
    DECODER_TRIALS,
    EXEMPLARS,
    POOLED,
    SCORES,
    TRIALS,
)
from milan_ray.stages.captioners import captioner_name
from milan_ray.stages.clip_dissect import ClipDissectLabels
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.cosy import CosyConfig, CosyScores, weights_of
from milan_ray.stages.dnd import DndConfig, Drawings, DrawnLabels, drawings_identity
from milan_ray.stages.embeddings import ImageEmbeddings, image_embeddings_fingerprint
from milan_ray.stages.encodings import AnyEncoderRef, Encodings
from milan_ray.stages.exemplars import describe_model, pooled_fingerprint, settled_fingerprints, why_exemplars
from milan_ray.stages.scores import (
    Described,
    ExemplarScores,
    ScoreConfig,
    Scores,
    sanity_fingerprint,
    sanity_name,
    truth_of,
)
from milan_ray.stages.training import Training, TrainingJob
from milan_ray.storage import Storage

if TYPE_CHECKING:
    from milan_ray.stages.decoder_search import DecoderTuningJob
    from milan_ray.stages.tuning import TuningJob


def plan_exemplars(
    storage: Storage,
    plan: Plan,
    models: Sequence[references.ModelRef],
    probe: references.ProbeRef,
    config: ExemplarConfig,
) -> dict[str, tuple[str, ...]]:
    """Adds the plan of :func:`milan_ray.stages.exemplars.run_exemplars`; returns model → layers that there will be.

    Args:
        storage: The run directory.
        plan: What is planned already.
        models: What to dissect.
        probe: The probe images.
        config: How.

    Raises:
        MilanError: The probe cannot be listed.
    """
    source = references.probe(probe)
    digest = probe_digest(source.manifest())
    done: dict[str, tuple[str, ...]] = {}
    for ref in dict.fromkeys(models):
        try:
            spec = references.model(ref)
            check_probe(spec, source)
            fingerprints = settled_fingerprints(storage, describe_model(spec, source, digest, config), spec.name)
        except MilanError as error:
            plan.failed[ref.name] = str(error)
            continue
        for layer, fingerprint in fingerprints.items():
            reason = why_exemplars(storage, fingerprint, spec.name, layer)
            plan.note(EXEMPLARS, fingerprint, reason, model=spec.name, layer=layer)
            if config.pooled:
                plan.add(storage, POOLED, pooled_fingerprint(fingerprint), model=spec.name, layer=layer)
        done[spec.name] = tuple(fingerprints)
    return done


def plan_labels(
    storage: Storage,
    plan: Plan,
    layers: Mapping[str, Sequence[str]],
    models: Sequence[references.ModelRef],
    how: LabelConfig,
    units: tuple[int, ...] = (),
) -> None:
    """Adds the plan of :func:`milan_ray.stages.concept_labels.run_labels`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        layers: Model → layers to label.
        models: The models to label.
        how: How to label.
        units: The units of every layer to label; empty for all.
    """
    grids = {ref.name: how.grid(references.model(ref)) for ref in models if ref.name not in plan.failed}
    plan.stages(storage, [ConceptLabels(layers, grids, how.labelers, units)])


def plan_clip_dissect(
    storage: Storage,
    plan: Plan,
    layers: Mapping[str, Sequence[str]],
    probe: references.ProbeRef,
    labeler: ClipDissect,
    ref: ImageTextRef,
    units: tuple[int, ...] = (),
) -> None:
    """Adds the plan of :func:`milan_ray.stages.clip_dissect.run_clip_dissect`.

    Args:
        storage: The run directory.
        plan: What is planned already, pooled activations among it.
        layers: Model → layers to label.
        probe: The probe they are of.
        labeler: The list of concepts, and how to compare.
        ref: The model of images and texts.
        units: The units of every layer to label; empty for all.
    """
    embedder = references.image_text(ref, probe.plugins)
    digest = probe_digest(references.probe(probe).manifest())
    images = ImageEmbeddings(ref, embedder, probe, digest)
    plan.stages(storage, [images, ClipDissectLabels(layers, labeler, ref, embedder, digest, units)])


def plan_dnd(
    storage: Storage, plan: Plan, layers: Mapping[str, Sequence[str]], how: DndConfig, units: tuple[int, ...] = ()
) -> None:
    """Adds the plan of :func:`milan_ray.stages.dnd.run_dnd`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        layers: Model → layers to describe.
        how: How to describe.
        units: The units of every layer to describe; empty for all.
    """
    drawings = Drawings(layers, how, drawings_identity(storage, how), units)
    plan.stages(storage, [drawings, DrawnLabels(layers, how.labeler, units)])


def plan_scores(
    storage: Storage,
    plan: Plan,
    described: Sequence[Described],
    probe: references.ProbeRef,
    ref: ImageTextRef,
    config: ScoreConfig,
    classes: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
    judged: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
) -> None:
    """Adds the plan of :func:`milan_ray.stages.scores.run_scores` and :func:`milan_ray.stages.scores.run_sanity`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        described: What to score.
        probe: The probe that it is of.
        ref: The model of images and texts.
        config: How to score.
        classes: (model, layer) → what each unit stands for.
        judged: The same, for layers on which the scores themselves are judged.

    Raises:
        MilanError: Pooled activations or the model are missing, or scores are to be judged by a model.
    """
    embedder = truth_of(ref, probe) if judged else references.image_text(ref, probe.plugins)
    digest = probe_digest(references.probe(probe).manifest())
    scores = Scores(described, ref, embedder, digest, config, classes)
    exemplars = ExemplarScores(described, ref, digest)
    plan.stages(storage, [ImageEmbeddings(ref, embedder, probe, digest), scores, exemplars])
    images = image_embeddings_fingerprint(embedder, digest)
    for (model, layer), concepts in (judged or {}).items():
        fingerprint = sanity_fingerprint(storage, model, layer, concepts, images.hash, config)
        plan.add(storage, SCORES, fingerprint, experiment=sanity_name(model, layer))


def plan_cosy(
    storage: Storage,
    plan: Plan,
    described: Sequence[Described],
    probe: references.ProbeRef,
    models: Sequence[references.ModelRef],
    ref: GeneratorRef,
    cosy: CosyConfig,
    config: ScoreConfig,
) -> None:
    """Adds the plan of :func:`milan_ray.stages.cosy.run_cosy`; arguments and errors as there."""
    digest = probe_digest(references.probe(probe).manifest())
    generator = references.generator(ref, probe.plugins)
    weights = weights_of(models)
    plan.stages(storage, [CosyScores(described, ref, generator, digest, weights, cosy, config)])


def plan_training(storage: Storage, job: TrainingJob) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.training.run_training`.

    Raises:
        MilanError: Exemplars or annotations are missing, or do not belong together.
    """
    plan = _plan_annotated(storage, job.layers, [job.encoder])
    plan.stages(storage, [Training(job)])
    return plan


def plan_tuning(storage: Storage, job: TuningJob, encoder: AnyEncoderRef) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.tuning.run_tuning`.

    Raises:
        MilanError: Exemplars or annotations are missing, or the captioner cannot do what the sweep asks for.
    """
    plan = _plan_annotated(storage, job.layers, [encoder])
    add_tuning(storage, plan, job, "encodings are missing or changed" if plan.due else None)
    return plan


def add_tuning(storage: Storage, plan: Plan, job: TuningJob, reason: str | None = None) -> None:
    """Adds a sweep on encodings that are planned already; a reason where one is known without looking at it."""
    from milan_ray.stages.tuning import why_tuning  # Ray Tune takes a second to import

    trials = f"{len(job.sweep.trials())} trials: "
    reason = reason or why_tuning(storage, job)
    plan.steps.append(Step(TRIALS.name, (captioner_name(job.decoder), job.name), reason and trials + reason))


def plan_decoder_tuning(storage: Storage, job: DecoderTuningJob, encoders: Sequence[AnyEncoderRef]) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.decoder_search.run_decoder_tuning`.

    Raises:
        MilanError: Exemplars or annotations are missing, or Optuna is asked for and not installed.
    """
    from milan_ray.stages.decoder_search import why_decoder_tuning

    plan = _plan_annotated(storage, job.layers, encoders)
    trials = f"{job.space.budget.trials} trials of at most {job.space.budget.epochs} epochs: "
    reason = "encodings are missing or changed" if plan.due else why_decoder_tuning(storage, job)
    plan.steps.append(Step(DECODER_TRIALS.name, (job.name,), reason and trials + reason))
    return plan


def _plan_annotated(storage: Storage, layers: Sequence[tuple[str, str]], encoders: Sequence[AnyEncoderRef]) -> Plan:
    plan = Plan()
    plan.stages(storage, [Encodings(by_model(layers), encoder) for encoder in encoders])
    return plan


def by_model(layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Model → layers, of pairs of them."""
    models: dict[str, list[str]] = {}
    for model, layer in layers:
        models.setdefault(model, []).append(layer)
    return models
