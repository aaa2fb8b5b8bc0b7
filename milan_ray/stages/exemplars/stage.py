"""The stage that makes exemplars, levels and pooled activations of the layers of several models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.config import ExemplarConfig, Resources, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.cluster import sized_for
from milan_ray.engine.model_cache import together
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.engine.tasks import retry_if_overtaken
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.exemplars.forward import reading
from milan_ray.exemplars.shard import StateConfig
from milan_ray.probe.base import Probe
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import Progress, say
from milan_ray.schema import EXEMPLARS, MANIFEST, POOLED
from milan_ray.stages.exemplars.check_features import check_features
from milan_ray.stages.exemplars.describe_model import (
    DescribedModel,
    describe_model,
    pooled_fingerprint,
    settled_model,
    why_exemplars,
)
from milan_ray.stages.exemplars.masks import recompute
from milan_ray.stages.exemplars.merge import Merged, merge, warn_of_nonfinite, warn_of_ties
from milan_ray.stages.exemplars.worker import (
    ExemplarWorker,
    ModelWork,
    Run,
    ShardReader,
    ShardsWorker,
    failing,
    shard_name,
)
from milan_ray.stages.images import ExemplarImages, ensure_views
from milan_ray.storage import Storage


@dataclass(frozen=True)
class DissectedModels:
    """Result of a run of :class:`Exemplars`.

    Attributes:
        models: Model name → the layers whose exemplars are stored.
        failed: Model name → why it could not be dissected.
    """

    models: dict[str, tuple[str, ...]]
    failed: dict[str, str]


def store_manifest(storage: Storage, ref: references.ProbeRef) -> tuple[pa.Table, str]:
    """Lists the probe and stores its manifest, keeping digests of bytes already read."""
    manifest = references.probe(ref).manifest()
    digest = probe_digest(manifest)
    if not storage.is_current(MANIFEST, digest, probe=digest):
        storage.write(MANIFEST, manifest, digest, probe=digest)
    return manifest, digest


class Exemplars(Stage):
    """Exemplars and levels of every unit of some models' layers; pooled activations where the configuration says so.

    Args:
        models: What to dissect.
        probe: The probe images.
        config: How.

    Attributes:
        layers: Model name → its layers; known once :meth:`outputs` is exhausted, or after :meth:`run`.
        failed: Model name → why it cannot be dissected; known at the same time.
    """

    table, name, title = EXEMPLARS, "exemplars", "exemplars"

    def __init__(
        self, models: Sequence[references.ModelRef], probe: references.ProbeRef, config: ExemplarConfig
    ) -> None:
        self._models, self._probe, self._config = tuple(dict.fromkeys(models)), probe, config
        self.layers: dict[str, tuple[str, ...]] = {}
        self.failed: dict[str, str] = {}

    def outputs(self, known: Known) -> Iterator[Output]:
        """The tables of every layer, by the model, how its layer is read, the probe and the configuration.

        Raises:
            MilanError: The probe cannot be listed.
        """
        source = references.probe(self._probe)
        digest = probe_digest(source.manifest())
        for ref in self._models:
            with failing(self.failed, ref.name):
                yield from self._outputs_of(ref.name, self._describe(known.storage, ref, source, digest))

    def _describe(self, storage: Storage, ref: references.ModelRef, source: Probe, digest: str) -> DescribedModel:
        described = settled_model(storage, ref, source, digest, self._config)
        self.layers[ref.name] = tuple(described.fingerprints)
        return described

    def _outputs_of(self, model: str, described: DescribedModel) -> Iterator[Output]:
        for layer, fingerprint in described.fingerprints.items():
            keys = {"model": model, "layer": layer}
            yield Output(keys, fingerprint)
            if self._config.pooled:
                yield Output(keys, pooled_fingerprint(fingerprint), table=POOLED)

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why a layer's exemplars with their levels, or its pooled activations, have to be made."""
        if output.table is POOLED:
            return storage.why(POOLED, output.fingerprint, **output.keys)
        return why_exemplars(storage, output.fingerprint, output.model, output.layer)

    @retry_if_overtaken
    def run(self, storage: Storage, resources: Resources) -> DissectedModels:
        """Makes what is missing or stale, and stores the exemplars' images.

        Args:
            storage: The run directory.
            resources: What of the cluster to use; Ray must be connected.

        Returns:
            What is now there, and which models failed.

        Raises:
            MilanError: The probe cannot be listed, or every model failed.
        """
        storage.check_writable()
        manifest, digest = store_manifest(storage, self._probe)
        self._config = sized_for(resources, self._config, len(manifest))
        run = Run(storage, self._probe, self._config, resources)
        self.layers, self.failed = {}, {}
        self._make(run, self.due(storage, digest, len(manifest)), manifest)
        views = self._views(storage)
        self.layers = {name: layers for name, layers in self.layers.items() if name not in self.failed}
        for name, reason in self.failed.items():
            say(f"FAILED {name}: {reason}")
        if not self.layers:
            reasons = list(self.failed.values())
            raise MilanError(reasons[0] if len(reasons) == 1 else "every model failed; see above.")
        for images, ids in views:
            ensure_views(storage, images, sorted(ids), resources)
        return DissectedModels(self.layers, self.failed)

    def due(self, storage: Storage, digest: str, images: int) -> list[ModelWork]:
        """The work of models with tables that are missing or stale; notes the models that fail.

        Args:
            storage: The run directory.
            digest: Digest of the probe manifest.
            images: Images of the probe.
        """
        source = references.probe(self._probe)
        every: list[ModelWork] = []
        for ref in self._models:
            with failing(self.failed, ref.name):
                item = self._work(storage, ref, self._describe(storage, ref, source, digest), digest, images)
                check_features(references.model(ref), source, item.read, self._config)
                if item.read:
                    every.append(item)
                else:
                    storage.remove_work(item.work)
                    say(f"exemplars of {ref.name}: all {len(item.every)} layers are up to date")
        return every

    def _work(
        self, storage: Storage, ref: references.ModelRef, described: DescribedModel, digest: str, images: int
    ) -> ModelWork:
        """The layers of a model that are missing or stale."""
        config = self._config
        due = [output for output in self._outputs_of(ref.name, described) if self.why(storage, output)]
        missing = tuple(output.layer for output in due if output.table is not POOLED)
        pooled = {output.layer: output.fingerprint for output in due if output.table is POOLED}
        if pooled and not missing:
            say(f"exemplars of {ref.name}: up to date; one more pass over the probe for their pooled activations")
        for layer in missing:
            if remark := described.layouts[layer].remark:
                say(f"layer {layer!r} of {ref.name} {remark}", level="warning")
        # Over all layers, so that a job killed while results become public finds its pieces again.
        hashes = {layer: fingerprint.hash for layer, fingerprint in described.fingerprints.items()}
        identity = {"model": ref.name, "exemplars": hashes, "map_budget": config.map_budget}
        work = config_hash({**identity, "shard_size": config.shard(images)})
        plan = StateConfig(images, config.k, config.quantile, config.samples, config.map_budget)
        return ModelWork(ref, described, self.layers[ref.name], missing, digest, work, plan, pooled)

    def _make(self, run: Run, work: Sequence[ModelWork], manifest: pa.Table) -> None:
        """Makes the tables of models; notes the models that fail."""
        self.failed |= run_shards(run, ExemplarWorker, work, [item.parts for item in work], self.title)[0]
        unmasked: list[Merged] = []
        for item in work:
            if item.model.name not in self.failed:
                with failing(self.failed, item.model.name):
                    merged = merge(run, item, len(manifest))
                    if merged.unmasked:
                        unmasked.append(merged)
                    else:
                        run.storage.remove_work(item.work)
        warn_of_nonfinite(run.storage, [item for item in work if item.model.name not in self.failed])
        self.failed |= recompute(run, unmasked, manifest)

    def _views(self, storage: Storage) -> list[tuple[ExemplarImages, set[int]]]:
        """The images that are exemplars, once per view over all models; warns of ties, notes damaged tables' models."""
        views: dict[tuple[str, str], tuple[ExemplarImages, set[int]]] = {}
        for ref in self._models:
            if ref.name in self.failed:
                continue
            try:
                shown = _shown(storage, ref.name, self.layers[ref.name])
                warn_of_ties(storage, ref.name, self.layers[ref.name])
            except DamagedTable as error:  # of values behind a sound footer: it looked up to date
                self.failed[ref.name] = str(error)
                continue
            for view, ids in shown.items():
                before = views[view][1] if view in views else set()
                views[view] = ExemplarImages(self._probe, *view, ref, self._config), before | ids
        return list(views.values())


def run_shards(
    run: Run,
    worker: type[ShardsWorker],
    work: Sequence[ModelWork],
    parts: Sequence[Sequence[str]],
    title: str,
    **arguments: object,
) -> tuple[dict[str, str], dict[str, float]]:
    """Runs every shard of some models that is not stored yet; one pool of actors serves all models.

    Args:
        run: The run.
        worker: Runs a shard of some models.
        work: The models' work.
        parts: For each model, what a finished shard's piece holds.
        title: What the work is called in messages.
        **arguments: Further arguments of the worker.

    Returns:
        Model → why it failed, and model → seconds of its shards.
    """
    todo: dict[int, list[int]] = {}
    for index, item in enumerate(work):
        shards, stored = range(item.shards(run.config)), run.storage.pieces_with(item.work, parts[index])
        todo[index] = [n for n in shards if shard_name(n) not in stored]
        if len(todo[index]) < len(shards):
            done = len(shards) - len(todo[index])
            say(f"{title} of {item.model.name}: {done} of {len(shards)} shards are done already")
    rows = list(_rows(run, work, todo)) if work else []
    names = [item.model.name for item in work]
    failed, seconds = dict[str, str](), dict.fromkeys(names, 0.0)
    if not rows:
        return failed, seconds
    total = sum(row["images"] * len(row["models"]) for row in rows)
    say(f"{title}: {', '.join(names)} over {work[0].plan.images} images, {sum(map(len, todo.values()))} shards")
    layers = [[(item.model.name, layer) for layer in item.read] for item in work]
    pieces = (piece for index, shards in todo.items() for _ in shards for piece in layers[index])
    with Progress(title, total, "images", pieces) as progress:
        arguments = {**run.arguments(work), **arguments}
        pieces_left = sum(map(len, todo.values()))
        for row in run_pool(worker, arguments, rows, run.resources, pieces=pieces_left, reader=ShardReader):
            for answer in row["models"]:
                name = names[answer["model"]]
                progress.advance(row["images"], layers[answer["model"]])
                seconds[name] += answer["seconds"]
                if answer["error"]:
                    failed.setdefault(name, answer["error"])
    return failed, seconds


def _rows(run: Run, work: Sequence[ModelWork], todo: Mapping[int, Sequence[int]]) -> Iterator[Row]:
    """A row for each shard and group of models that share its images.

    What travels through Ray says where a shard lies in the manifest, not what is in it.
    """
    images = work[0].plan.images
    size = run.config.shard(images)
    for group, members in enumerate(_groups(work)):
        for n in sorted(set().union(*(todo[index] for index in members))):
            models = [index for index in members if n in todo[index]]
            row = {"group": group, "models": models, "shard": n, "start": n * size}
            yield {**row, "images": min(size, images - n * size)}


def _groups(work: Sequence[ModelWork]) -> list[list[int]]:
    """Models that an actor runs over a shard while its images stay: of the same inputs, and together small enough."""
    by_inputs: dict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(work):
        by_inputs[reading(references.model(item.model))].append(index)
    return [
        [members[place] for place in places]
        for members in by_inputs.values()
        for places in together([work[index].nbytes for index in members])
    ]


def rerun_work(
    storage: Storage,
    ref: references.ModelRef,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    layers: Sequence[str],
    work: str,
) -> ModelWork:
    """The work of running some layers of a dissected model over its probe again.

    Args:
        storage: The run directory, which holds the exemplars.
        ref: The model.
        probe: The probe that it was dissected on.
        config: How it was dissected.
        layers: The layers.
        work: Hash of the work.
    """
    spec = references.model(ref)
    digest = (storage.metadata(EXEMPLARS, model=ref.name, layer=layers[0]) or {})["probe"]
    described = describe_model(spec, references.probe(probe), digest, config)
    images = storage.count(MANIFEST, probe=digest)
    plan = StateConfig(images, config.k, config.quantile, config.samples, config.map_budget)
    return ModelWork(ref, described, spec.layers, tuple(layers), digest, work, plan)


def _shown(storage: Storage, model: str, layers: Sequence[str]) -> dict[tuple[str, str], set[int]]:
    """(probe, view) → the images that are exemplars of a model's layers."""
    ids: dict[tuple[str, str], set[int]] = defaultdict(set)
    for layer in layers:
        metadata = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
        column = storage.read(EXEMPLARS, ["image_id"], model=model, layer=layer)["image_id"]
        ids[metadata["probe"], metadata["view"]].update(pc.unique(column).to_pylist())
    return ids
