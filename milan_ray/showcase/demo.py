"""The main job on the built-in world: from nothing to a report, with the truth known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray import schema
from milan_ray.annotations.groups import training_groups
from milan_ray.captioner.fit import Sizes
from milan_ray.config import ExemplarConfig, Fingerprint, Resources, TrainingConfig
from milan_ray.engine import references
from milan_ray.engine.planner import NETWORKS, Plan, Step
from milan_ray.engine.stage import Known, Layers, Output, Stage, due, pairs, run_stage, run_stages
from milan_ray.labelers.clip import CLIP, Clip
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.progress import say
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, ENCODINGS, SCORES, TRIALS
from milan_ray.scoring.evaluation import RANDOM, best_constant, evaluate_text, nearest_copy, with_trivial_rows
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.stages.descriptions import Search, description_stages, run_descriptions
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.rerank import reranking_stages
from milan_ray.stages.training import Training, TrainingJob, run_trainings
from milan_ray.stages.tuning import Tuning, TuningJob
from milan_ray.stages.tuning_statistics import Sweep
from milan_ray.storage import Storage
from milan_ray.studies.judges import statistics as judges
from milan_ray.studies.judges.run import HELD_OUT_SCENES, PLANTED, activations, scenes_of
from milan_ray.world.image_text import image_text_task
from milan_ray.world.networks import planted_concepts
from milan_ray.world.plugin import CLASSIFIERS, GENERATORS
from milan_ray.world.probe import WORLD_DIGEST
from milan_ray.world.training import TrainTask, generator_task, places_tasks, train_all_tasks

DECODER = "world"
"""Name of the captioner, and of its encoder."""

TRAIN = ("world/cnn", "world/vit")
"""Networks whose annotated units train the captioner."""

HELD_OUT = "world/resnet"
"""The architecture it never saw."""

CONTROL = "world/resnet-random"
"""The same architecture, untrained."""

MODELS = (*TRAIN, HELD_OUT, CONTROL, PLANTED)
"""The demo's networks; all but the untrained one are annotated."""

GENERATOR = "world/generator"
"""Paints scenes from their codes; on request only."""

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
"""What the networks of the groups are dissected on."""

EXEMPLARS = ExemplarConfig()
SEARCH = Search(DECODER)
TRAINING = TrainingConfig(max_epochs=15, patience=6, hold_out=0.15, decoder_batch_size=32, lm_batch_size=32)
SIZES = Sizes(embedding=64, hidden=256)
"""A fraction of the paper's: the world's language is small."""

TUNING = "lam"
"""Name of the sweep over λ."""

GROUP_TRAINING = replace(TRAINING, max_epochs=10, patience=4)

SWEEP = Sweep((50,), tuple(step / 20 for step in range(21)), metric="rouge-l-f")
"""λ of re-ranking; the candidates are those of the descriptions. BERTScore chooses where there is a model for it."""

EXPERIMENTS = ("held-out text", "held-out truth", "untrained truth", "planted units", "interpretable units")

SYSTEMS = {"wPMI": MILAN, "p(d|E)": LIKELIHOOD}
CLIP_SYSTEM = {"wPMI beam + CLIP": CLIP}
"""What the evaluation compares, as it is shown: system → labeler; the last only where it is asked for."""

_ANNOTATED = (NETWORKS, schema.EXEMPLARS.name, ANNOTATIONS.name)
"""What must be current before it is known which units are annotated."""

Sets = Mapping[references.ProbeRef, Sequence[str]]
"""Probe → networks that are dissected on it."""

Units = dict[tuple[str, int], str]
"""(layer, unit) → text."""


def run_demo(storage: Storage, resources: Resources, threads: int, clip: bool = False) -> pa.Table:
    """Runs everything that is missing; returns the evaluation.

    Args:
        storage: The run directory.
        resources: What of the cluster to use; Ray must be connected.
        threads: Torch threads of the training worker.
        clip: Also train the world's own model of images and texts, and re-rank with it.
    """
    make_main(Run(storage, EXEMPLARS, resources), threads, clip)
    names = (*EXPERIMENTS, f"tuning of {DECODER} by {TUNING}")
    return pa.concat_tables([storage.read(SCORES, experiment=name) for name in names])


def run_generator(storage: Storage, resources: Resources) -> None:
    """Trains the world's generator, dissects it and describes its units with the captioner of :func:`run_demo`."""
    make_generator(Run(storage, EXEMPLARS, resources))


def run_groups(
    storage: Storage,
    resources: Resources,
    sets: Sets = SETS,
    config: ExemplarConfig = EXEMPLARS,
    training: TrainingConfig = GROUP_TRAINING,
    groups: Sequence[str] = ("all",),
) -> None:
    """Trains a captioner on each of the paper's groups of sets, played by the world's networks, side by side.

    Args:
        storage: The run directory.
        resources: What of the cluster to use; Ray must be connected.
        sets: Probe → networks that are dissected on it.
        config: How to dissect.
        training: How to train.
        groups: Which groups, as :func:`~milan_ray.annotations.groups.training_groups` takes them.
    """
    make_groups(Run(storage, config, resources), sets, training, groups)


def plan_demo(storage: Storage, clip: bool = False, generator: bool = False, groups: bool = False) -> Plan:
    """The dry run of the demo.

    Args:
        storage: The run directory.
        clip: With re-ranking (:func:`run_demo`).
        generator: With the world's generator (:func:`run_generator`).
        groups: With a captioner per group of sets (:func:`run_groups`).
    """
    dry = DryRun(storage, EXEMPLARS)
    make_main(dry, clip=clip)
    if generator:
        make_generator(dry)
    if groups:
        make_groups(dry)
    return dry.plan


def make_main(make: Run, threads: int = 1, clip: bool = False) -> None:
    """Makes the demo's networks, captioner, descriptions and evaluation, or plans them; arguments as of run_demo."""
    make.networks(train_all_tasks())
    layers = make.dissection({PROBE: MODELS})
    make.captioners(DECODER, lambda: [replace(captioner_job(layers), threads=threads)])
    make.descriptions("the demo's networks", layers)
    make.tuning(layers)
    if clip:
        make.reranking(layers)
    make.evaluation(layers, SYSTEMS | (CLIP_SYSTEM if clip else {}))


def make_generator(make: Run) -> None:
    """Makes the generator's exemplars and descriptions, or plans them."""
    make.networks([generator_task()])
    make.descriptions(GENERATOR, make.dissection({CODES: (GENERATOR,)}))


def make_sets(make: Run, sets: Sets = SETS) -> Layers:
    """Makes the sets of annotated units that play the paper's, or plans them; returns model → layers."""
    needed = {"encoder", *(name.removeprefix("world/") for models in sets.values() for name in models)}
    tasks = (generator_task(), *places_tasks(), *train_all_tasks())
    make.networks([task for task in tasks if task.name in needed])
    return make.dissection(sets)


def make_groups(
    make: Run, sets: Sets = SETS, training: TrainingConfig = GROUP_TRAINING, groups: Sequence[str] = ("all",)
) -> None:
    """Makes a captioner per group of sets, or plans them; arguments as of :func:`run_groups`."""
    layers = make_sets(make, sets)
    make.captioners("of every group", lambda: group_jobs(layers, training, groups))


class Run:
    """Makes what is missing or stale of each part of the demo.

    Args:
        storage: The run directory.
        config: How to dissect.
        resources: What of the cluster to use.
    """

    def __init__(self, storage: Storage, config: ExemplarConfig, resources: Resources) -> None:
        self.storage, self.config, self.resources = storage, config, resources

    def networks(self, tasks: Sequence[TrainTask]) -> None:
        """Trains networks of the world."""
        world.train_networks(tasks)

    def dissection(self, sets: Sets) -> dict[str, tuple[str, ...]]:
        """Dissects networks, annotates them and encodes their exemplars; returns model → layers."""
        layers: dict[str, tuple[str, ...]] = {}
        for probe, names in sets.items():
            models = [references.ModelRef(name) for name in names]
            dissected = Exemplars(models, probe, self.config).run(self.storage, self.resources).models
            world.annotate(self.storage, probe, _annotated(dissected))
            layers |= dissected
        run_stage(Encodings(layers, EncoderRef(DECODER)), self.storage, self.resources)
        return layers

    def captioners(self, shown: str, jobs: Callable[[], list[TrainingJob]]) -> None:
        """Trains captioners on dissected networks."""
        run_trainings(self.storage, jobs())

    def descriptions(self, shown: str, layers: Layers) -> None:
        """Describes the units of layers."""
        run_descriptions(self.storage, layers, SEARCH, self.resources)

    def tuning(self, layers: Layers) -> None:
        """Tunes λ."""
        Tuning(tuning_job(layers)).run(self.storage, self.resources)

    def reranking(self, layers: Layers) -> None:
        """Trains the world's model of images and texts, and re-ranks with it."""
        clip, captioner = Clip(world.train_image_text()), load_captioner(self.storage, SEARCH.decoder)
        run_stages(reranking_stages(layers, SEARCH, captioner, clip), self.storage, self.resources)

    def evaluation(self, layers: Layers, systems: Mapping[str, str]) -> None:
        """Scores the descriptions."""
        Evaluation(layers, systems).run(self.storage)


class DryRun(Run):
    """Plans the same parts from the stages that make them.

    Args:
        storage: The run directory.
        config: How to dissect.
    """

    def __init__(self, storage: Storage, config: ExemplarConfig) -> None:
        super().__init__(storage, config, Resources())
        self.plan = Plan()

    def networks(self, tasks: Sequence[TrainTask]) -> None:
        """Plans networks, each once."""
        absent = {task.name for task in world.untrained(tasks)}
        steps = [Step(NETWORKS, (task.name,), "missing" if task.name in absent else None) for task in tasks]
        self.plan.steps += [step for step in steps if step not in self.plan.steps]

    def dissection(self, sets: Sets) -> dict[str, tuple[str, ...]]:
        """Plans exemplars, annotations and encodings; returns the layers that are known."""
        layers: dict[str, tuple[str, ...]] = {}
        for probe, names in sets.items():
            tables, shown = (schema.EXEMPLARS, ANNOTATIONS, ENCODINGS), (", ".join(names),)
            waiting = [self.plan.waits(table.name, shown, NETWORKS) for table in tables]
            if not any(waiting):
                models = [references.ModelRef(name) for name in names]
                exemplars = Exemplars(models, probe, self.config)
                self._stages(exemplars)
                annotations = world.Annotations(_annotated(exemplars.layers))
                self._stages(annotations, Encodings(exemplars.layers, EncoderRef(DECODER)))
                layers |= exemplars.layers
        return layers

    def captioners(self, shown: str, jobs: Callable[[], list[TrainingJob]]) -> None:
        """Plans captioners."""
        if not self.plan.waits(schema.TRAINING.name, (shown,), *_ANNOTATED):
            self._stages(*(Training(job) for job in jobs()))

    def descriptions(self, shown: str, layers: Layers) -> None:
        """Plans descriptions."""
        if not self.plan.waits(DESCRIPTIONS.name, (shown,), NETWORKS, schema.TRAINING.name):
            self._stages(*description_stages(layers, SEARCH, load_captioner(self.storage, SEARCH.decoder)))

    def tuning(self, layers: Layers) -> None:
        """Plans the sweep over λ."""
        if not self.plan.waits(TRIALS.name, (DECODER, TUNING), *_ANNOTATED, ENCODINGS.name, schema.TRAINING.name):
            self._stages(Tuning(tuning_job(layers)))

    def reranking(self, layers: Layers) -> None:
        """Plans the model of images and texts, and re-ranking."""
        self.networks([image_text_task()])
        if not self.plan.waits(DESCRIPTIONS.name, ("re-ranked",), NETWORKS, schema.TRAINING.name):
            captioner, clip = load_captioner(self.storage, SEARCH.decoder), Clip(str(world.image_text_folder()))
            self._stages(*reranking_stages(layers, SEARCH, captioner, clip))

    def evaluation(self, layers: Layers, systems: Mapping[str, str]) -> None:
        """Plans scores."""
        if not self.plan.waits(SCORES.name, ("of the demo",), *_ANNOTATED, DESCRIPTIONS.name):
            self._stages(Evaluation(layers, systems))

    def _stages(self, *stages: Stage) -> None:
        self.plan.stages(self.storage, stages)


def _annotated(layers: Layers) -> Layers:
    """The networks that are annotated: all but the untrained one."""
    return {model: of_model for model, of_model in layers.items() if model != CONTROL}


def captioner_job(models: Mapping[str, Sequence[str]]) -> TrainingJob:
    """The training of the demo's captioner, on networks given with their layers."""
    layers = tuple((model, layer) for model in TRAIN for layer in models[model])
    return TrainingJob(DECODER, world.SOURCE, layers, EncoderRef(DECODER), TRAINING, SIZES)


def tuning_job(models: Mapping[str, Sequence[str]]) -> TuningJob:
    """The sweep over λ: half of the annotated units of networks new to the captioner choose, the others judge."""
    folder = minilm_directory()
    sweep = replace(SWEEP, metric="bertscore-f") if folder else SWEEP
    layers = tuple((model, layer) for model in (HELD_OUT, PLANTED) for layer in models[model])
    return TuningJob(TUNING, DECODER, world.SOURCE, layers, sweep, str(folder) if folder else None)


def group_jobs(
    models: Mapping[str, Sequence[str]],
    training: TrainingConfig = GROUP_TRAINING,
    groups: Sequence[str] = ("all",),
) -> list[TrainingJob]:
    """The trainings of :func:`run_groups`, on networks given with their layers."""
    return [
        TrainingJob(
            group,
            world.SOURCE,
            tuple((model, layer) for model in members for layer in models[model]),
            EncoderRef(DECODER),
            training,
            SIZES,
        )
        for group, members in training_groups(groups, models).items()
    ]


class Evaluation(Stage):
    """Scores of the descriptions of the held-out, the planted and the untrained network.

    Args:
        models: Model → layers.
        systems: System, as it is shown → labeler; the first is the one that trivial baselines are compared with.
    """

    table, name, title = SCORES, "evaluation", "evaluation"

    def __init__(self, models: Layers, systems: Mapping[str, str]) -> None:
        self._models, self._systems = models, systems

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per evaluation; all follow from descriptions and annotations."""
        layers, annotated = pairs(self._models), pairs(_annotated(self._models))
        configs = [
            known.config(DESCRIPTIONS, labeler=labeler, model=model, layer=layer)
            for model, layer in layers
            for labeler in self._systems.values()
        ]
        configs += [
            known.config(ANNOTATIONS, source=world.SOURCE, model=model, layer=layer) for model, layer in annotated
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
            for table in _evaluate(storage, self._models, self._systems, BertScore(folder) if folder else None):
                storage.write(SCORES, table, outputs[0].fingerprint, experiment=table["experiment"][0].as_py())


def _evaluate(
    storage: Storage, models: Mapping[str, Sequence[str]], labelers: Mapping[str, str], bert: BertScore | None
) -> list[pa.Table]:
    text, told, untrained, planted, interpretable = EXPERIMENTS
    said = _annotations(storage, {HELD_OUT: models[HELD_OUT]})[HELD_OUT]
    units = sorted(said, key=lambda unit: (list(models[HELD_OUT]).index(unit[0]), unit[1]))
    trained = _annotations(storage, {name: models[name] for name in TRAIN})
    train_units = [(model, *unit) for model, found in trained.items() for unit in found]
    captions = [trained[model][layer, unit] for model, layer, unit in train_units]
    features = {name: _mean_features(storage, name, models[name]) for name in (*TRAIN, HELD_OUT)}
    copies = nearest_copy(
        np.stack([features[model][layer, unit] for model, layer, unit in train_units]),
        [group[0] for group in captions],
        np.stack([features[HELD_OUT][unit] for unit in units]),
    )
    constant = best_constant(captions)
    own = {}
    for system, labeler in labelers.items():
        described = _descriptions(storage, HELD_OUT, models[HELD_OUT], labeler)
        own[system] = [described[unit] for unit in units]
    systems = with_trivial_rows(own, constant, copies)
    control = _descriptions(storage, CONTROL, models[CONTROL], MILAN)
    tables = [
        evaluate_text(text, systems | {RANDOM: [control[unit] for unit in units]}, [said[u] for u in units], bert)
    ]
    found = world.truth(storage, {name: models[name] for name in (HELD_OUT, CONTROL)}, HELD_OUT_SCENES)
    scenes = scenes_of(HELD_OUT_SCENES)
    shown = judges.presence(scenes)
    tables.append(
        pa.concat_tables(
            [
                judges.described_auroc(told, found[HELD_OUT].activations, shown, systems),
                judges.causal_drops(told, activations(storage, {HELD_OUT: models[HELD_OUT]}), scenes, systems),
            ]
        )
    )
    own_control = with_trivial_rows({"wPMI": [control[unit] for unit in units]}, constant)
    tables.append(judges.described_auroc(untrained, found[CONTROL].activations, shown, own_control))
    named = {system: _descriptions(storage, PLANTED, models[PLANTED], labeler) for system, labeler in labelers.items()}
    order = sorted(named[next(iter(labelers))])
    said = _annotations(storage, {PLANTED: models[PLANTED]})[PLANTED]
    of_planted = with_trivial_rows(
        {system: [found[unit] for unit in order] for system, found in named.items()}, constant
    ) | {"an annotator": [said[unit][0] for unit in order]}
    concepts = [planted_concepts[unit] for _, unit in order]
    tables.append(judges.planted_accuracy(planted, concepts, of_planted))
    shares = {"trained": found[HELD_OUT].iou, RANDOM: found[CONTROL].iou}
    tables.append(judges.iou_shares(interpretable, shares))
    return tables


def _annotations(storage: Storage, models: Mapping[str, Sequence[str]]) -> dict[str, dict[tuple[str, int], list[str]]]:
    found: dict[str, dict[tuple[str, int], list[str]]] = {}
    for model, layers in models.items():
        units = found.setdefault(model, {})
        for layer in layers:
            for row in storage.read(ANNOTATIONS, source=world.SOURCE, model=model, layer=layer).to_pylist():
                units.setdefault((layer, row["unit"]), []).append(row["text"])
    return found


def _descriptions(storage: Storage, model: str, layers: Sequence[str], labeler: str) -> Units:
    return {
        (layer, row["unit"]): row["description"]
        for layer in layers
        for row in storage.read(DESCRIPTIONS, labeler=labeler, model=model, layer=layer).to_pylist()
    }


def _mean_features(storage: Storage, model: str, layers: Sequence[str]) -> dict[tuple[str, int], np.ndarray]:
    return {
        (layer, unit): features.mean(axis=0)
        for layer in layers
        for unit, features in unit_features(storage.read(ENCODINGS, encoder=DECODER, model=model, layer=layer)).items()
    }


def summary(scores: pa.Table) -> str:
    """The evaluation on one screen: the main measures, each system beside the rows that cost nothing."""
    frame = pl.from_arrow(scores)
    assert isinstance(frame, pl.DataFrame)
    lines = []
    for experiment, metrics in (
        ("held-out text", ("bleu-2", "rouge-l-f", "bertscore-f")),
        ("held-out truth", ("auroc", "causal-drop")),
        ("untrained truth", ("auroc",)),
        ("planted units", ("planted-accuracy",)),
        ("interpretable units", ("iou>.04",)),
        (f"tuning of {DECODER} by {TUNING}", ("rouge-l-f", "bertscore-f")),
    ):
        rows = frame.filter(pl.col("experiment") == experiment, ~pl.col("system").str.contains(" − "))
        for metric in metrics:
            values = rows.filter(pl.col("metric") == metric)
            if values.is_empty():
                continue
            shown = [
                f"{row['system']} {row['value']:.3g}" if row["n"] else str(row["note"])
                for row in values.iter_rows(named=True)
            ]
            lines.append(f"  {experiment}, {metric}: " + " · ".join(shown))
    return "\n".join(lines)
