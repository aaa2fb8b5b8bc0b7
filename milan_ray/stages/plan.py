"""What a job would do, and why: the stages' own recipes beside the storage. Starts no Ray, writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from milan_ray.captioner.captioner import Captioner
from milan_ray.config import ExemplarConfig, Recipe
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import check_probe
from milan_ray.labelers.clip import Clip
from milan_ray.labelers.clip_dissect import ClipDissect
from milan_ray.models.generators import GeneratorRequest
from milan_ray.models.image_text import ImageTextRequest
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.schema import (
    CANDIDATES,
    DECODER_TRIALS,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    EXEMPLARS,
    IMAGE_EMBEDDINGS,
    POOLED,
    SCORES,
    TRAINING,
    TRIALS,
    UNIT_SCORES,
    Noun,
)
from milan_ray.stages.captioners import captioner_name, load_captioner
from milan_ray.stages.clip_dissect import clip_dissect_recipe
from milan_ray.stages.concept_labels import LabelConfig, label_recipe
from milan_ray.stages.cosy import CosyConfig, cosy_recipes, weights_of
from milan_ray.stages.descriptions import (
    Search,
    candidates_recipe,
    description_recipe,
    labelers,
    search_identity,
)
from milan_ray.stages.dnd import DndConfig, dnd_recipe, drawings_identity, drawings_recipe
from milan_ray.stages.embeddings import image_embeddings_recipe
from milan_ray.stages.encodings import Request, encoder_identity, encodings_recipe
from milan_ray.stages.exemplars import describe_model, pooled_recipe, settled_recipes, why_exemplars
from milan_ray.stages.rerank import wide_search
from milan_ray.stages.scores import (
    Described,
    ScoreConfig,
    exemplar_score_recipes,
    sanity_name,
    sanity_recipe,
    score_recipes,
    truth_of,
)
from milan_ray.stages.training import TrainingJob, training_recipe, why_training
from milan_ray.storage import Storage

if TYPE_CHECKING:
    from milan_ray.stages.decoder_search import DecoderTuningJob
    from milan_ray.stages.tuning import TuningJob

Layers = Mapping[tuple[str, str], str]
"""(model, layer) → configuration hash that a table of all its units will have."""


NETWORKS = "networks"
"""What stands among the names of tables for networks to be trained first; they lie beside models, not in storages."""


DOWNLOADS = "downloads"
"""The same for files that would be fetched first."""


@dataclass(frozen=True)
class Step:
    """One partition.

    Attributes:
        table: Name of the table.
        keys: Its partition: model and layer, with what else tells it apart.
        reason: Why it would be made; None when it is up to date.
    """

    table: str
    keys: tuple[str, ...]
    reason: str | None


@dataclass
class Plan:
    """What a job would do.

    Attributes:
        steps: Its partitions, in the order of the stages.
        later: Partitions, or groups of them, that are made of what is not there yet: only then can it be told whether
            they would be made.
        failed: Model → why it would be skipped.
        pooled: (model, layer) → configuration hash that its pooled activations will have, where they are asked for.
    """

    steps: list[Step] = field(default_factory=list)
    later: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    pooled: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def due(self) -> list[Step]:
        """The steps that would run."""
        return [step for step in self.steps if step.reason]

    def text(self) -> str:
        """The steps that would run, a line each, those that cannot be told yet, and how many would not."""
        due = self.due
        rows = [(step.table, " ".join(step.keys), step.reason) for step in (*due, *self.later)]
        rows += [("skipped", name, reason) for name, reason in self.failed.items()]
        width = max((len(where) for _, where, _ in rows), default=0)
        lines = [f"{table:12}  {where:{width}}  {reason}" for table, where, reason in rows]
        current = len(self.steps) - len(due)
        after = f", {len(self.later)} depend on them" if self.later else ""
        what = "tables"
        for others in (NETWORKS, DOWNLOADS):
            if any(step.table == others for step in self.steps):
                what = f"{others} and tables"
        counted = f"{len(due)} {what} would be made, {current} are up to date{after}; nothing was done."
        return "\n".join([*lines, counted])

    def add(self, storage: Storage, noun: Noun, recipe: Recipe, **keys: str) -> None:
        """Adds a partition of which the recipe is known."""
        self.steps.append(Step(noun.name, tuple(keys.values()), storage.why(noun, recipe, **keys)))

    def waits(self, table: str, keys: tuple[str, ...], *before: str, of: str | None = None) -> bool:
        """Whether a table is made of others that would be made first, so that its recipe is not known; notes it then.

        Args:
            table: Its name.
            keys: Its partition, or what stands for several.
            *before: Names of the others.
            of: A key that the others' partitions must have to count, such as a model; None for any.
        """
        for ahead in (self.due, self.later):
            there = {step.table for step in ahead if of is None or of in step.keys}
            if first := [name for name in before if name in there]:
                step = Step(table, keys, f"not known before: {', '.join(first)}")
                self.later += [] if step in self.later else [step]
                return True
        return False


def plan_exemplars(
    storage: Storage,
    models: Sequence[references.ModelRequest],
    probe: references.ProbeRequest,
    config: ExemplarConfig,
    plan: Plan | None = None,
) -> tuple[Plan, Layers]:
    """The plan of :func:`milan_ray.stages.exemplars.run_exemplars`, and what its exemplars will be.

    Args:
        storage: The run directory.
        models: What to dissect.
        probe: The probe images.
        config: How.
        plan: What is planned already, which is added to; None for nothing.

    Raises:
        MilanError: The probe cannot be listed.
    """
    source = references.probe(probe)
    digest = probe_digest(source.manifest())
    plan = plan or Plan()
    layers: dict[tuple[str, str], str] = {}
    for request in dict.fromkeys(models):
        try:
            spec = references.model(request)
            check_probe(spec, source)
            recipes = settled_recipes(storage, describe_model(spec, source, digest, config), spec.name)
        except MilanError as error:
            plan.failed[request.name] = str(error)
            continue
        for layer, recipe in recipes.items():
            reason = why_exemplars(storage, recipe, spec.name, layer)
            plan.steps.append(Step(EXEMPLARS.name, (spec.name, layer), reason))
            if config.pooled:
                plan.add(storage, POOLED, pooled_recipe(recipe), model=spec.name, layer=layer)
                plan.pooled[spec.name, layer] = pooled_recipe(recipe).hash
            layers[spec.name, layer] = recipe.hash
    return plan, layers


def plan_present(storage: Storage, models: Mapping[str, Sequence[str]]) -> tuple[Plan, Layers]:
    """The empty plan that takes the exemplars as they are, model name → layers, and what they are.

    Raises:
        MilanError: There are none of one of them.
    """
    return Plan(), {
        (model, layer): storage.config_of(EXEMPLARS, model=model, layer=layer)
        for model, layers in models.items()
        for layer in layers
    }


def plan_encodings(
    storage: Storage, plan: Plan, exemplars: Layers, encoder: Request, units: tuple[int, ...] = ()
) -> Layers:
    """Adds the plan of :func:`milan_ray.stages.encodings.run_encodings`; returns what its encodings will be."""
    identity = encoder_identity(encoder)
    layers: dict[tuple[str, str], str] = {}
    for (model, layer), config in exemplars.items():
        recipe = encodings_recipe(identity, config, units)
        plan.add(storage, ENCODINGS, recipe, encoder=encoder.name, model=model, layer=layer)
        layers[model, layer] = recipe.whole
    return layers


def plan_descriptions(
    storage: Storage, plan: Plan, encodings: Layers, search: Search, units: tuple[int, ...] = ()
) -> None:
    """Adds the plan of :func:`milan_ray.stages.descriptions.run_descriptions`."""
    captioner = load_captioner(storage, search.decoder)
    recipes = _plan_candidates(storage, plan, encodings, captioner, search, units)
    for labeler in labelers(captioner, search):
        for (model, layer), recipe in recipes.items():
            described = description_recipe(recipe, labeler)
            plan.add(storage, DESCRIPTIONS, described, labeler=labeler.name, model=model, layer=layer)


def _plan_candidates(
    storage: Storage, plan: Plan, encodings: Layers, captioner: Captioner, search: Search, units: tuple[int, ...]
) -> dict[tuple[str, str], Recipe]:
    identity = search_identity(captioner, search)
    recipes = {key: candidates_recipe(identity, config, units) for key, config in encodings.items()}
    for (model, layer), recipe in recipes.items():
        plan.add(storage, CANDIDATES, recipe, decoder=search.name, model=model, layer=layer)
    return recipes


def plan_reranking(
    storage: Storage,
    plan: Plan,
    exemplars: Layers,
    encodings: Layers,
    search: Search,
    clip: Clip,
    units: tuple[int, ...] = (),
) -> None:
    """Adds the plan of :func:`milan_ray.stages.rerank.run_reranking`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        exemplars: What exemplars will be.
        encodings: What the captioner's encodings will be.
        search: The captioner and its own search.
        clip: How to re-rank.
        units: The units of every layer to describe; empty for all.
    """
    captioner = load_captioner(storage, search.decoder)
    recipes = _plan_candidates(storage, plan, encodings, captioner, wide_search(captioner, search, clip), units)
    compared = plan_encodings(storage, plan, exemplars, clip, units)
    labeler = clip.labeler()
    for (model, layer), recipe in recipes.items():
        described = description_recipe(recipe, labeler, compared[model, layer])
        plan.add(storage, DESCRIPTIONS, described, labeler=labeler.name, model=model, layer=layer)


def plan_labels(
    storage: Storage,
    plan: Plan,
    exemplars: Layers,
    models: Sequence[references.ModelRequest],
    how: LabelConfig,
    units: tuple[int, ...] = (),
) -> None:
    """Adds the plan of :func:`milan_ray.stages.concept_labels.run_labels`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        exemplars: What exemplars will be.
        models: The models to label.
        how: How to label.
        units: The units of every layer to label; empty for all.
    """
    grids = {request.name: how.grid(references.model(request)) for request in models if request.name not in plan.failed}
    for labeler in how.labelers:
        for (model, layer), config in exemplars.items():
            recipe = label_recipe(labeler, config, grids[model], units)
            plan.add(storage, DESCRIPTIONS, recipe, labeler=labeler.name, model=model, layer=layer)


def plan_clip_dissect(
    storage: Storage,
    plan: Plan,
    exemplars: Layers,
    probe: references.ProbeRequest,
    labeler: ClipDissect,
    request: ImageTextRequest,
    units: tuple[int, ...] = (),
) -> None:
    """Adds the plan of :func:`milan_ray.stages.clip_dissect.run_clip_dissect`.

    Args:
        storage: The run directory.
        plan: What is planned already, pooled activations among it.
        exemplars: What exemplars will be.
        probe: The probe they are of.
        labeler: The list of concepts, and how to compare.
        request: The model of images and texts.
        units: The units of every layer to label; empty for all.
    """
    embedder = references.image_text(request, probe.plugins)
    digest = probe_digest(references.probe(probe).manifest())
    images = image_embeddings_recipe(embedder, digest)
    plan.add(storage, IMAGE_EMBEDDINGS, images, encoder=request.name, probe=digest)
    for (model, layer), config in exemplars.items():
        pooled = plan.pooled[model, layer]
        recipe = clip_dissect_recipe(labeler, embedder.text_identity(), config, pooled, images.hash, units)
        plan.add(storage, DESCRIPTIONS, recipe, labeler=labeler.name, model=model, layer=layer)


def plan_dnd(storage: Storage, plan: Plan, exemplars: Layers, how: DndConfig, units: tuple[int, ...] = ()) -> None:
    """Adds the plan of :func:`milan_ray.stages.dnd.run_dnd`.

    Args:
        storage: The run directory.
        plan: What is planned already.
        exemplars: What exemplars will be.
        how: How to describe.
        units: The units of every layer to describe; empty for all.
    """
    identity = drawings_identity(storage, how)
    for (model, layer), config in exemplars.items():
        drawings = drawings_recipe(identity, config, units)
        keys = {"labeler": how.labeler.name, "model": model, "layer": layer}
        plan.add(storage, DRAWINGS, drawings, **keys)
        plan.add(storage, DESCRIPTIONS, dnd_recipe(drawings, how.labeler), **keys)


def plan_scores(
    storage: Storage,
    plan: Plan,
    described: Sequence[Described],
    probe: references.ProbeRequest,
    request: ImageTextRequest,
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
        request: The model of images and texts.
        config: How to score.
        classes: (model, layer) → what each unit stands for.
        judged: The same, for layers on which the scores themselves are judged.

    Raises:
        MilanError: Pooled activations or the model are missing, or scores are to be judged by a model.
    """
    embedder = truth_of(request, probe) if judged else references.image_text(request, probe.plugins)
    digest = probe_digest(references.probe(probe).manifest())
    images = image_embeddings_recipe(embedder, digest)
    plan.add(storage, IMAGE_EMBEDDINGS, images, encoder=request.name, probe=digest)
    recipes = score_recipes(storage, described, digest, embedder, images.hash, config, classes)
    recipes |= exemplar_score_recipes(storage, described, images.hash)
    for what, recipe in recipes.items():
        plan.add(storage, UNIT_SCORES, recipe, predictor=request.name, **what.keys)
    for (model, layer), concepts in (judged or {}).items():
        recipe = sanity_recipe(storage, model, layer, concepts, images.hash, config)
        plan.add(storage, SCORES, recipe, experiment=sanity_name(model, layer))


def plan_cosy(
    storage: Storage,
    plan: Plan,
    described: Sequence[Described],
    probe: references.ProbeRequest,
    models: Sequence[references.ModelRequest],
    request: GeneratorRequest,
    cosy: CosyConfig,
    config: ScoreConfig,
) -> None:
    """Adds the plan of :func:`milan_ray.stages.cosy.run_cosy`; arguments and errors as there."""
    digest = probe_digest(references.probe(probe).manifest())
    generator = references.generator(request, probe.plugins)
    weights = weights_of(models)
    for what, recipe in cosy_recipes(storage, described, digest, weights, generator, cosy, config).items():
        plan.add(storage, UNIT_SCORES, recipe, predictor=request.name, **what.keys)


def plan_training(storage: Storage, job: TrainingJob) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.training.run_training`.

    Raises:
        MilanError: Exemplars or annotations are missing, or do not belong together.
    """
    plan, (encodings,) = _plan_annotated(storage, job.layers, [job.encoder])
    add_training(storage, plan, job, encodings)
    return plan


def add_training(storage: Storage, plan: Plan, job: TrainingJob, encodings: Layers) -> Recipe:
    """Adds a training on encodings that are planned already; returns what decides its captioner."""
    recipe = training_recipe(storage, job, encodings)
    plan.steps.append(Step(TRAINING.name, (job.name,), why_training(storage, job, recipe)))
    return recipe


def plan_tuning(storage: Storage, job: TuningJob, encoder: Request) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.tuning.run_tuning`.

    Raises:
        MilanError: Exemplars or annotations are missing, or the captioner cannot do what the sweep asks for.
    """
    plan, _ = _plan_annotated(storage, job.layers, [encoder])
    add_tuning(storage, plan, job, "encodings are missing or changed" if plan.due else None)
    return plan


def add_tuning(storage: Storage, plan: Plan, job: TuningJob, reason: str | None = None) -> None:
    """Adds a sweep on encodings that are planned already; a reason where one is known without looking at it."""
    from milan_ray.stages.tuning import why_tuning  # Ray Tune takes a second to import

    trials = f"{len(job.sweep.trials())} trials: "
    reason = reason or why_tuning(storage, job)
    plan.steps.append(Step(TRIALS.name, (captioner_name(job.decoder), job.name), reason and trials + reason))


def plan_decoder_tuning(storage: Storage, job: DecoderTuningJob, encoders: Sequence[Request]) -> Plan:
    """The plan of encoding the annotated layers and :func:`milan_ray.stages.decoder_search.run_decoder_tuning`.

    Raises:
        MilanError: Exemplars or annotations are missing, or Optuna is asked for and not installed.
    """
    from milan_ray.stages.decoder_search import why_decoder_tuning

    plan, _ = _plan_annotated(storage, job.layers, encoders)
    trials = f"{job.space.budget.trials} trials of at most {job.space.budget.epochs} epochs: "
    reason = "encodings are missing or changed" if plan.due else why_decoder_tuning(storage, job)
    plan.steps.append(Step(DECODER_TRIALS.name, (job.name,), reason and trials + reason))
    return plan


def _plan_annotated(
    storage: Storage, layers: Sequence[tuple[str, str]], encoders: Sequence[Request]
) -> tuple[Plan, list[Layers]]:
    plan, exemplars = plan_present(storage, by_model(layers))
    return plan, [plan_encodings(storage, plan, exemplars, encoder) for encoder in encoders]


def by_model(layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Model → layers, of pairs of them."""
    models: dict[str, list[str]] = {}
    for model, layer in layers:
        models.setdefault(model, []).append(layer)
    return models
