"""The demo: the main job on the built-in world, whose truth is known, from nothing to an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray import schema
from milan_ray.annotations.groups import training_groups
from milan_ray.captioner.fit import Sizes
from milan_ray.config import ExemplarConfig, Fingerprint, Resources, TrainingConfig
from milan_ray.engine import references
from milan_ray.engine.planner import NETWORKS, Plan, Step
from milan_ray.engine.stage import Known, Layers, Output, RunnableStage, Stage, due, pairs, run_stage
from milan_ray.labelers.clip import CLIP, Clip
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.progress import say
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, ENCODINGS, SCORES, TRIALS
from milan_ray.scoring.evaluation import (
    RANDOM,
    best_constant,
    evaluate_text,
    nearest_copy,
    summary_lines,
    with_trivial_rows,
)
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.stages.descriptions import Search, description_stages
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.rerank import reranking_stages
from milan_ray.stages.training import Training, TrainingJob, run_trainings
from milan_ray.stages.tuning import Tuning
from milan_ray.stages.tuning_statistics import Sweep
from milan_ray.stages.tuning_trial import TuningJob
from milan_ray.storage import Storage
from milan_ray.studies.judges import statistics as judges
from milan_ray.studies.judges.run import HELD_OUT_SCENES, PLANTED, activations, scenes_of
from milan_ray.studies.tables import Unit, frame_of, read_annotations, read_descriptions
from milan_ray.world.image_text import image_text_task
from milan_ray.world.networks import planted_concepts
from milan_ray.world.plugin import CLASSIFIERS, GENERATORS
from milan_ray.world.probe import WORLD_DIGEST
from milan_ray.world.training import TrainTask, generator_task, places_tasks, superposed_task, train_all_tasks

DECODER = "world"
"""Name of the captioner, and of its encoder."""

TRAIN = ("world/cnn", "world/vit")
"""Networks whose annotated units train the captioner."""

HELD_OUT = "world/resnet"
"""A network of an architecture that the captioner was not trained on."""

CONTROL = "world/resnet-random"
"""A network of the same architecture, untrained."""

MODELS = (*TRAIN, HELD_OUT, CONTROL, PLANTED)
"""The demo's networks; all but the untrained one are annotated."""

GENERATOR = "world/generator"
"""A generator of scenes from their codes; only on request."""

SUPERPOSED = "world/superposed"
"""A network with more concepts than channels; only on request."""

PROBE = references.ProbeRef(("world/probe",))
CODES = references.ProbeRef(("world/probe-codes",))
TRAIN_SCENES = references.ProbeRef(("world/train",))
TRAIN_CODES = references.ProbeRef(("world/train-codes",))

SETS: Mapping[references.ProbeRef, Sequence[str]] = {
    PROBE: tuple(name for (_, dataset), name in CLASSIFIERS.items() if dataset == "objects"),
    TRAIN_SCENES: tuple(name for (_, dataset), name in CLASSIFIERS.items() if dataset == "places"),
    CODES: (GENERATORS["generator", "objects"],),
    TRAIN_CODES: (GENERATORS["generator", "places"],),
}
"""Probe → networks of the groups that are dissected on it."""

EXEMPLARS = ExemplarConfig()
SEARCH = Search(DECODER)
TRAINING = TrainingConfig(max_epochs=15, patience=6, hold_out=0.15, decoder_batch_size=32, lm_batch_size=32)
SIZES = Sizes(embedding=64, hidden=256)
"""Smaller than the paper's, because the world's language is small."""

TUNING = "lam"
"""Name of the sweep over λ."""

GROUP_TRAINING = replace(TRAINING, max_epochs=10, patience=4)

SWEEP = Sweep((50,), tuple(step / 20 for step in range(21)), metric="rouge-l-f")
"""Values of λ for re-ranking the candidates of the descriptions. BERTScore chooses if there is a model for it."""

EXPERIMENTS = ("held-out text", "held-out truth", "untrained truth", "planted units", "interpretable units")

SYSTEMS = {"wPMI": MILAN, "p(d|E)": LIKELIHOOD}
CLIP_SYSTEM = {"wPMI beam + CLIP": CLIP}
"""Systems that the evaluation compares, as they are shown → labeler; the last only on request."""

_ANNOTATED = (NETWORKS, schema.EXEMPLARS.name, ANNOTATIONS.name)
"""Tables that must be up to date before the annotated units are known."""

TRAINED = schema.TRAINING.name
"""Table that must be up to date before a captioner can be loaded."""

Sets = Mapping[references.ProbeRef, Sequence[str]]
"""Probe → networks that are dissected on it."""


def run_demo(storage: Storage, resources: Resources, threads: int, clip: bool = False) -> pa.Table:
    """Runs everything that is missing; returns the evaluation.

    Args:
        storage: The run directory.
        resources: The part of the cluster to use; Ray must be connected.
        threads: Torch threads of the training worker.
        clip: Also train the world's own model of images and texts, and re-rank with it.
    """
    Steps(storage, EXEMPLARS, resources).main(threads, clip)
    names = (*EXPERIMENTS, f"tuning of {DECODER} by {TUNING}")
    return pa.concat_tables([storage.read(SCORES, experiment=name) for name in names])


def run_generator(storage: Storage, resources: Resources) -> None:
    """Trains the world's generator, dissects it and describes its units with the captioner of :func:`run_demo`."""
    Steps(storage, EXEMPLARS, resources).generator()


def run_superposed(storage: Storage, resources: Resources) -> None:
    """Trains the world's network in superposition, dissects it and describes its units as :func:`run_demo` does."""
    Steps(storage, EXEMPLARS, resources).superposed()


def run_groups(
    storage: Storage,
    resources: Resources,
    sets: Sets = SETS,
    config: ExemplarConfig = EXEMPLARS,
    training: TrainingConfig = GROUP_TRAINING,
    groups: Sequence[str] = ("all",),
) -> None:
    """Trains a captioner on each of the paper's groups of sets, represented by the world's networks, in parallel.

    Args:
        storage: The run directory.
        resources: The part of the cluster to use; Ray must be connected.
        sets: Probe → networks that are dissected on it.
        config: Settings of the dissection.
        training: Settings of the trainings.
        groups: The groups, as :func:`~milan_ray.annotations.groups.training_groups` takes them.
    """
    Steps(storage, config, resources).groups(sets, training, groups)


def plan_demo(
    storage: Storage, clip: bool = False, generator: bool = False, groups: bool = False, superposed: bool = False
) -> Plan:
    """The dry run of the demo.

    Args:
        storage: The run directory.
        clip: With re-ranking (:func:`run_demo`).
        generator: With the world's generator (:func:`run_generator`).
        groups: With a captioner per group of sets (:func:`run_groups`).
        superposed: With the world's network in superposition (:func:`run_superposed`).
    """
    plan = Plan()
    steps = Steps(storage, EXEMPLARS, Resources(), plan)
    steps.main(clip=clip)
    if generator:
        steps.generator()
    if superposed:
        steps.superposed()
    if groups:
        steps.groups()
    return plan


@dataclass(frozen=True)
class Steps:
    """The steps of the demo: each makes what is missing or stale, or adds to a plan what it would make.

    Attributes:
        storage: The run directory.
        config: Settings of the dissection.
        resources: The part of the cluster to use; Ray must be connected, unless there is a plan.
        plan: The plan of a dry run; None runs the steps.
    """

    storage: Storage
    config: ExemplarConfig
    resources: Resources
    plan: Plan | None = None

    def main(self, threads: int = 1, clip: bool = False) -> None:
        """The demo's networks, captioner, descriptions and evaluation; arguments as of :func:`run_demo`."""
        self._networks(train_all_tasks())
        layers = self._dissection({PROBE: MODELS})
        self._captioners(DECODER, lambda: [replace(captioner_job(layers), threads=threads)])
        self._descriptions("the demo's networks", layers)
        if self._known(TRIALS, f"{DECODER} {TUNING}", *_ANNOTATED, ENCODINGS.name, TRAINED):
            tuning = Tuning(tuning_job(layers))
            self._make([tuning], partial(tuning.run, self.storage, self.resources))
        if clip:
            self._reranking(layers)
        if self._known(SCORES, "of the demo", *_ANNOTATED, DESCRIPTIONS.name):
            evaluation = Evaluation(layers, SYSTEMS | (CLIP_SYSTEM if clip else {}))
            self._make([evaluation], partial(evaluation.run, self.storage))

    def generator(self) -> None:
        """The generator's exemplars and descriptions."""
        self._networks([generator_task()])
        self._descriptions(GENERATOR, self._dissection({CODES: (GENERATOR,)}))

    def superposed(self) -> None:
        """The exemplars and descriptions of the network in superposition."""
        self._networks([superposed_task()])
        self._descriptions(SUPERPOSED, self._dissection({PROBE: (SUPERPOSED,)}))

    def sets(self, sets: Sets = SETS) -> Layers:
        """The sets of annotated units that represent the paper's; returns model → layers, as far as they are known."""
        needed = {"encoder", *(name.removeprefix("world/") for models in sets.values() for name in models)}
        tasks = (generator_task(), *places_tasks(), *train_all_tasks())
        self._networks([task for task in tasks if task.name in needed])
        return self._dissection(sets)

    def groups(
        self, sets: Sets = SETS, training: TrainingConfig = GROUP_TRAINING, groups: Sequence[str] = ("all",)
    ) -> None:
        """A captioner per group of sets; arguments as of :func:`run_groups`."""
        layers = self.sets(sets)
        self._captioners("of every group", lambda: group_jobs(layers, training, groups))

    def _networks(self, tasks: Sequence[TrainTask]) -> None:
        """Networks of the world."""
        if self.plan is None:
            world.train_networks(tasks)
            return
        absent = {task.name for task in world.untrained(tasks)}
        steps = [Step(NETWORKS, (task.name,), "missing" if task.name in absent else None) for task in tasks]
        self.plan.steps += [step for step in steps if step not in self.plan.steps]

    def _dissection(self, sets: Sets) -> Layers:
        """Exemplars, annotations and encodings; returns model → layers, as far as they are known."""
        layers: dict[str, tuple[str, ...]] = {}
        for probe, names in sets.items():
            tables = (schema.EXEMPLARS, ANNOTATIONS, ENCODINGS)
            known = [self._known(table, ", ".join(names), NETWORKS) for table in tables]
            if all(known):
                exemplars = Exemplars([references.ModelRef(name) for name in names], probe, self.config)
                self._make([exemplars], partial(exemplars.run, self.storage, self.resources))
                annotated = _annotated(exemplars.layers)
                self._make([world.Annotations(annotated)], partial(world.annotate, self.storage, probe, annotated))
                layers |= exemplars.layers
        if layers:
            self._make([Encodings(layers, EncoderRef(DECODER))])
        return layers

    def _captioners(self, shown: str, jobs: Callable[[], list[TrainingJob]]) -> None:
        """Captioners, trained on dissected networks."""
        if self._known(schema.TRAINING, shown, *_ANNOTATED):
            trainings = jobs()
            self._make([Training(job) for job in trainings], partial(run_trainings, self.storage, trainings))

    def _descriptions(self, shown: str, layers: Layers) -> None:
        """Descriptions by the captioner."""
        if self._known(DESCRIPTIONS, shown, NETWORKS, TRAINED):
            self._make(description_stages(layers, SEARCH, load_captioner(self.storage, SEARCH.decoder)))

    def _reranking(self, layers: Layers) -> None:
        """The world's model of images and texts, and descriptions that are re-ranked with it."""
        if self.plan is None:
            world.train_image_text()
        else:
            self._networks([image_text_task()])
        if self._known(DESCRIPTIONS, "re-ranked", NETWORKS, TRAINED):
            clip = Clip(str(world.image_text_folder()))
            self._make(reranking_stages(layers, SEARCH, load_captioner(self.storage, SEARCH.decoder), clip))

    def _known(self, table: schema.Table, shown: str, *before: str) -> bool:
        """Whether the stages of a table can be listed; a plan cannot list them before the tables that they depend on.

        Args:
            table: The table.
            shown: Text for its partitions in the plan.
            *before: Names of the tables that its stages depend on.
        """
        return self.plan is None or not self.plan.waits(table.name, (shown,), *before)

    def _make(self, stages: Sequence[Stage], run: Callable[[], object] | None = None) -> None:
        """Runs stages, by ``run`` if they have a function of their own, or adds them to the plan."""
        if self.plan is not None:
            self.plan.stages(self.storage, stages)
        elif run is not None:
            run()
        else:
            for stage in stages:
                assert isinstance(stage, RunnableStage)
                run_stage(stage, self.storage, self.resources)


def _annotated(layers: Layers) -> Layers:
    """The networks that are annotated: all but the untrained one."""
    return {model: of_model for model, of_model in layers.items() if model != CONTROL}


def captioner_job(models: Layers) -> TrainingJob:
    """The training of the demo's captioner, on networks given with their layers."""
    return _training_job(DECODER, TRAIN, models, TRAINING)


def group_jobs(models: Layers, training: TrainingConfig, groups: Sequence[str]) -> list[TrainingJob]:
    """The trainings of :func:`run_groups`, on networks given with their layers."""
    return [
        _training_job(group, members, models, training) for group, members in training_groups(groups, models).items()
    ]


def _training_job(name: str, members: Iterable[str], models: Layers, training: TrainingConfig) -> TrainingJob:
    layers = tuple(pairs({model: models[model] for model in members}))
    return TrainingJob(name, world.SOURCE, layers, EncoderRef(DECODER), training, SIZES)


def tuning_job(models: Layers) -> TuningJob:
    """The sweep over λ: half of the annotated units of networks new to the captioner choose, the others judge."""
    folder = minilm_directory()
    sweep = replace(SWEEP, metric="bertscore-f") if folder else SWEEP
    layers = tuple(pairs({model: models[model] for model in (HELD_OUT, PLANTED)}))
    return TuningJob(TUNING, DECODER, world.SOURCE, layers, sweep, str(folder) if folder else None)


@dataclass(frozen=True)
class Evaluation(Stage):
    """Scores of the descriptions of the held-out, the planted and the untrained network.

    Attributes:
        models: Model → layers.
        systems: System, as it is shown → labeler; trivial baselines are compared with the first.
    """

    table, name, title = SCORES, "evaluation", "evaluation"

    models: Layers
    systems: Mapping[str, str]

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per experiment; all are determined by descriptions and annotations."""
        configs = [
            known.config(DESCRIPTIONS, labeler=labeler, model=model, layer=layer)
            for model, layer in pairs(self.models)
            for labeler in self.systems.values()
        ]
        configs += [
            known.config(ANNOTATIONS, source=world.SOURCE, model=model, layer=layer)
            for model, layer in pairs(_annotated(self.models))
        ]
        bertscore = minilm_directory() is not None
        inputs = {"evaluation": 1, "judged": configs, "world": WORLD_DIGEST, "bertscore": bertscore}
        for name in EXPERIMENTS:
            yield Output({"experiment": name}, Fingerprint.of(inputs))

    def run(self, storage: Storage) -> None:
        """Makes all tables if one is missing or stale."""
        if outputs := due(self, storage):
            say("evaluation: against the annotators and against the world itself")
            folder = minilm_directory()
            tables = list(_evaluate(storage, self.models, self.systems, BertScore(folder) if folder else None))
            for name, table in zip(EXPERIMENTS, tables, strict=True):
                storage.write(SCORES, table, outputs[0].fingerprint, experiment=name)


def _evaluate(
    storage: Storage, models: Layers, labelers: Mapping[str, str], bert: BertScore | None
) -> Iterator[pa.Table]:
    """The tables of :data:`EXPERIMENTS`, in their order."""
    text, truth, untrained, planted, interpretable = EXPERIMENTS

    def annotations(*names: str) -> dict[Unit, list[str]]:
        return read_annotations(storage, world.SOURCE, pairs({name: models[name] for name in names}))

    def described(model: str, labeler: str, units: Iterable[Unit]) -> list[str]:
        rows = read_descriptions(storage, model, models[model], labeler).iter_rows()
        texts = {(layer, unit): description for layer, unit, description in rows}
        return [texts[layer, unit] for _, layer, unit in units]

    held_out, trained, in_planted = annotations(HELD_OUT), annotations(*TRAIN), annotations(PLANTED)
    captions = list(trained.values())
    constant = best_constant(captions)
    features = _mean_features(storage, {name: models[name] for name in (*TRAIN, HELD_OUT)})
    copies = nearest_copy(
        np.stack([features[unit] for unit in trained]),
        [texts[0] for texts in captions],
        np.stack([features[unit] for unit in held_out]),
    )
    own = {system: described(HELD_OUT, labeler, held_out) for system, labeler in labelers.items()}
    systems = with_trivial_rows(own, constant, copies)
    control = described(CONTROL, MILAN, held_out)
    yield evaluate_text(text, systems | {RANDOM: control}, list(held_out.values()), bert)

    truths = world.truth(storage, {name: models[name] for name in (HELD_OUT, CONTROL)}, HELD_OUT_SCENES)
    scenes = scenes_of(HELD_OUT_SCENES)
    shown = judges.presence(scenes)
    yield pa.concat_tables(
        [
            judges.described_auroc(truth, truths[HELD_OUT].activations, shown, systems),
            judges.causal_drops(truth, activations(storage, {HELD_OUT: models[HELD_OUT]}), scenes, systems),
        ]
    )
    of_control = with_trivial_rows({"wPMI": control}, constant)
    yield judges.described_auroc(untrained, truths[CONTROL].activations, shown, of_control)

    units = sorted(in_planted)
    named = {system: described(PLANTED, labeler, units) for system, labeler in labelers.items()}
    named = with_trivial_rows(named, constant) | {"an annotator": [in_planted[unit][0] for unit in units]}
    yield judges.planted_accuracy(planted, [planted_concepts[unit] for _, _, unit in units], named)
    yield judges.iou_shares(interpretable, {"trained": truths[HELD_OUT].iou, RANDOM: truths[CONTROL].iou})


def _mean_features(storage: Storage, models: Layers) -> dict[Unit, np.ndarray]:
    """Unit → mean encoder feature of its exemplars."""
    return {
        (model, layer, unit): features.mean(axis=0)
        for model, layer in pairs(models)
        for unit, features in unit_features(storage.read(ENCODINGS, encoder=DECODER, model=model, layer=layer)).items()
    }


def summary(scores: pa.Table) -> str:
    """The evaluation on one screen: the main measures, each system alongside trivial baselines."""
    main = {
        "held-out text": ("bleu-2", "rouge-l-f", "bertscore-f"),
        "held-out truth": ("auroc", "causal-drop"),
        "untrained truth": ("auroc",),
        "planted units": ("planted-accuracy",),
        "interpretable units": ("iou>.04",),
        f"tuning of {DECODER} by {TUNING}": ("rouge-l-f", "bertscore-f"),
    }
    rows = frame_of(scores).filter(~pl.col("system").str.contains(" − "))
    return summary_lines(
        pl.concat(
            rows.filter(experiment=experiment, metric=metric) for experiment in main for metric in main[experiment]
        )
    )
