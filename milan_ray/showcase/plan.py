"""What the jobs on the built-in world would do, and why: as :mod:`milan_ray.stages.plan`, from its networks on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from milan_ray.engine import references
from milan_ray.engine.planner import NETWORKS, Plan, Planned, Step
from milan_ray.engine.stage import pairs
from milan_ray.labelers.clip import Clip
from milan_ray.schema import ANNOTATIONS, CLAIMS, DESCRIPTIONS, ENCODINGS, EXEMPLARS, SCORES, TRAINING, TRIALS
from milan_ray.showcase import demo
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.stages.descriptions import description_stages
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.rerank import reranking_stages
from milan_ray.stages.training import Training
from milan_ray.stages.tuning import Tuning
from milan_ray.storage import Storage
from milan_ray.world.image_text import image_text_task
from milan_ray.world.training import TrainTask, generator_task, train_all_tasks


def plan_demo(storage: Storage, clip: bool = False, generator: bool = False, groups: bool = False) -> Plan:
    """The plan of the demo.

    Args:
        storage: The run directory.
        clip: With re-ranking (:func:`milan_ray.showcase.demo.run_demo`).
        generator: With the world's generator (:func:`milan_ray.showcase.demo.run_generator`).
        groups: With a captioner per group of sets (:func:`milan_ray.showcase.demo.run_groups`).
    """
    plan = Plan()
    _plan_main(storage, plan, clip)
    if generator:
        _plan_generator(storage, plan)
    if groups:
        models = _plan_sets(storage, plan)
        if not plan.waits(TRAINING.name, ("of every group",), NETWORKS, EXEMPLARS.name, ANNOTATIONS.name):
            for job in demo.group_jobs(models):
                plan.stages(storage, [Training(job)])
    return plan


def plan_paper(storage: Storage, small: bool, names: Sequence[str]) -> Plan:
    """The plan of :func:`milan_ray.showcase.paper.prepare`, and of the experiments as far as it can be told.

    Every run of an experiment finds its claims anew; which of its own tables it makes for that only the run itself
    says.

    Args:
        storage: The run directory.
        small: With sizes of a test.
        names: The experiments.
    """
    plan = Plan()
    _plan_main(storage, plan, clip=False)
    if not small:
        _plan_generator(storage, plan)
        _plan_sets(storage, plan)
    for name in names:
        there = storage.metadata(CLAIMS, experiment=name) is not None
        reason = "found anew by every run, from tables of its own that it makes where they are missing or stale"
        plan.steps.append(Step(CLAIMS.name, (name,), reason if there else "missing"))
    return plan


def _plan_main(storage: Storage, plan: Plan, clip: bool) -> None:
    _plan_networks(plan, train_all_tasks())
    models = _plan_dissection(storage, plan, demo.MODELS, demo.PROBE)
    made = (NETWORKS, EXEMPLARS.name, ANNOTATIONS.name)
    if not plan.waits(TRAINING.name, (demo.DECODER,), *made):
        plan.stages(storage, [Training(demo.captioner_job(models))])
    _plan_descriptions(storage, plan, "the demo's networks", models)
    if not plan.waits(TRIALS.name, (demo.DECODER, demo.TUNING), *made, ENCODINGS.name, TRAINING.name):
        plan.stages(storage, [Tuning(demo.tuning_job(models))])
    if clip:
        _plan_networks(plan, [image_text_task()])
        if not plan.waits(DESCRIPTIONS.name, ("re-ranked",), NETWORKS, TRAINING.name):
            how = Clip(str(world.image_text_folder()))
            captioner = load_captioner(storage, demo.SEARCH.decoder)
            plan.stages(storage, reranking_stages(models, demo.SEARCH, captioner, how))
    systems = demo.SYSTEMS | (demo.CLIP_SYSTEM if clip else {})
    if not plan.waits(SCORES.name, ("of the demo",), *made, DESCRIPTIONS.name):
        fingerprint = demo.evaluation_fingerprint(storage, models, systems)
        for name in demo.EXPERIMENTS:
            plan.add(storage, SCORES, fingerprint, experiment=name)


def _plan_generator(storage: Storage, plan: Plan) -> None:
    _plan_networks(plan, [generator_task()])
    models = _plan_dissection(storage, plan, [demo.GENERATOR], demo.CODES)
    _plan_descriptions(storage, plan, demo.GENERATOR, models)


def _plan_sets(storage: Storage, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Adds all sets' networks; returns their layers."""
    _plan_networks(plan, demo.sets_tasks())
    found: dict[str, tuple[str, ...]] = {}
    for probe, models in demo.SETS.items():
        found |= _plan_dissection(storage, plan, models, probe)
    return found


def _plan_networks(plan: Plan, tasks: Iterable[TrainTask]) -> None:
    """Adds the networks that were not planned before."""
    known = {step.keys for step in plan.steps if step.table == NETWORKS}
    tasks = [task for task in tasks if (task.name,) not in known]
    absent = {task.name for task in world.untrained(tasks)} if tasks else set()
    plan.steps += [Step(NETWORKS, (task.name,), "missing" if task.name in absent else None) for task in tasks]


def _plan_dissection(
    storage: Storage, plan: Plan, names: Sequence[str], probe: references.ProbeRef
) -> dict[str, tuple[str, ...]]:
    """Adds exemplars, annotations and encodings of the world's networks; returns their layers."""
    shown = (", ".join(names),)
    waiting = [plan.waits(noun.name, shown, NETWORKS) for noun in (EXEMPLARS, ANNOTATIONS, ENCODINGS)]
    if any(waiting):
        return {}
    exemplars = Exemplars([references.ModelRef(name) for name in names], probe, demo.EXEMPLARS)
    plan.stages(storage, [exemplars])
    for model, layer in pairs(exemplars.layers):
        if model != demo.CONTROL:
            fingerprint = world.annotations_fingerprint(
                Planned(storage, plan).config(EXEMPLARS, model=model, layer=layer)
            )
            plan.add(storage, ANNOTATIONS, fingerprint, source=world.SOURCE, model=model, layer=layer)
    plan.stages(storage, [Encodings(exemplars.layers, EncoderRef(demo.DECODER))])
    return exemplars.layers


def _plan_descriptions(storage: Storage, plan: Plan, whose: str, models: dict[str, tuple[str, ...]]) -> None:
    if not plan.waits(DESCRIPTIONS.name, (whose,), NETWORKS, TRAINING.name):
        captioner = load_captioner(storage, demo.SEARCH.decoder)
        plan.stages(storage, description_stages(models, demo.SEARCH, captioner))
