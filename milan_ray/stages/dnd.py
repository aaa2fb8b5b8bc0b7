"""Describe-and-Dissect (Bai et al., TMLR 2025; docs/describe-and-dissect.md), an actor pool per stage.

pooled ─► [augment: top images, attention crops] ─► [caption] ─► [summarise] ─► candidate labels
       candidate labels ─► [draw: images of each, what the units make of them] ─► drawings ─► [score] ─► descriptions
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from milan_ray.config import ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Layers, Output, Stage, TaskStage, due, pairs, run_stage
from milan_ray.engine.tasks import FEW_IMAGES, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError, all_failed, unknown_name
from milan_ray.exemplars.forward import Forward, read_inputs
from milan_ray.exemplars.images import decode
from milan_ray.exemplars.pooled import matrix, maxima, means
from milan_ray.exemplars.shard import Plan
from milan_ray.labelers.dnd.crops import MOST, attention_boxes, crop
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.labelers.dnd.summaries import FrequentPhrases, Prompted, Summariser
from milan_ray.labelers.protocol import Drawn, Evidence
from milan_ray.models.chat import Endpoint, Limits, LocalChat
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_captions import ImageCaptioner, ImageCaptionerRef, find_folder
from milan_ray.models.image_text import ImageTextRef
from milan_ray.models.registry import ModelSpec
from milan_ray.plugins import load_plugins
from milan_ray.probe.base import ImageRef
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, DRAWINGS, EXEMPLARS, MANIFEST, POOLED
from milan_ray.stages.exemplars import DissectedModels, ModelWork, ModelWorker, describe_model
from milan_ray.stages.images import png
from milan_ray.storage import EXEMPLARS_KEY, Storage, WorkRemovedError

KERNEL_VERSION = "dnd-1"

UNITS = 8
"""Units of a layer that are augmented, captioned and summarised at a time."""

LABELS = 4
"""Distinct candidate labels that are drawn at a time."""

POOLINGS = {"mean": means, "max": maxima}
"""What stands for a unit's map of an image, by the column of ``pooled`` that holds it."""

OWN = "milan/"
"""What names of captioners begin with that describe units, and are to caption images."""

FREQUENT = "frequent"
"""The summariser that counts."""

_TOP_SCHEMA = pa.schema([("unit", pa.int32()), ("image_id", pa.int64()), ("root", pa.string()), ("path", pa.string())])
_AUGMENTED_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("image_id", pa.int64()),
        ("box", pa.list_(pa.int32())),
        ("activation", pa.float32()),
        ("image", pa.large_binary()),
    ]
)
_ANCHORS_SCHEMA = pa.schema([("unit", pa.int32()), ("embedding", pa.list_(pa.float32()))])
_TEXTS_SCHEMA = pa.schema([("unit", pa.int32()), ("text", pa.string())])
_WANTED_SCHEMA = pa.schema([("text", pa.string()), ("layer", pa.int32()), ("unit", pa.int32())])
_DRAWN_SCHEMA = pa.schema(
    [*_WANTED_SCHEMA, ("activations", pa.list_(pa.float32())), ("similarities", pa.list_(pa.float32()))]
)


@dataclass(frozen=True)
class SummariserRef:
    """What turns captions into candidate labels, as it travels to workers.

    Attributes:
        name: :data:`FREQUENT`, a folder or a name in ``$MILAN_MODELS_DIR`` of a language model, or a server's address.
        model: The model's name on the server.
        temperature: Of a language model's answers.
        limits: How a server may be used.
    """

    name: str = FREQUENT
    model: str | None = None
    temperature: float = 0.3
    limits: Limits = field(default_factory=Limits)

    @property
    def is_server(self) -> bool:
        """Whether it is a server, which this process asks itself: its key stays here."""
        return "://" in self.name

    def load(self, storage: Storage) -> Summariser:
        """Builds it, on the CPU.

        Args:
            storage: The run directory, which keeps a server's answers.

        Raises:
            MilanError: There is none.
        """
        if self.name == FREQUENT:
            return FrequentPhrases()
        if not self.is_server:
            folder = find_folder(self.name, "--llm", default="Qwen/Qwen2.5-7B-Instruct")
            return Prompted(LocalChat(folder, self.temperature))
        if self.model is None:
            raise MilanError(f"{self.name} may serve several models: name one with --llm-model.")
        return Prompted(Endpoint(self.name, self.model, storage, self.temperature, self.limits))


@dataclass(frozen=True)
class DndConfig:
    """How units are described and dissected.

    Attributes:
        labeler: How candidates are scored, and the partition's name.
        captioner: Says what images show.
        summariser: Turns captions into candidates.
        generator: Draws images of candidates.
        embedder: Compares images; None where the scoring function does not.
        images: Exemplars per unit, crops included.
        crops: Attention crops per image at most; 0 for none.
        pooling: A key of :data:`POOLINGS`: the method's is ``mean``, which says little of units with signed outputs.
        drawn: Images per candidate.
        prompt: What the generator is asked for; ``{}`` stands for the candidate.
        seed: Seed of the drawn images.
        plugins: Modules that register any of these.
    """

    labeler: DescribeAndDissect
    captioner: ImageCaptionerRef
    summariser: SummariserRef
    generator: GeneratorRef
    embedder: ImageTextRef | None = None
    images: int = 10
    crops: int = MOST
    pooling: str = "mean"
    drawn: int = 10
    prompt: str = "a realistic photograph of {}"
    seed: int = 0
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise unknown_name("pooling", self.pooling, POOLINGS)
        if "{}" not in self.prompt:
            raise MilanError(
                f"the prompt {self.prompt!r} has no {{}} where the candidate label goes: give one with it."
            )
        if self.labeler.compares and self.embedder is None:
            raise MilanError(
                f"scoring by {self.labeler.scoring} compares images: name a model of images and texts with --clip, or "
                "score by topk-squared-mean."
            )


class _Piece(Protocol):
    def identity(self) -> dict[str, object]: ...

    def to(self, device: torch.device) -> Any: ...


def image_captioner(storage: Storage, how: DndConfig) -> ImageCaptioner:
    """What captions images.

    Raises:
        MilanError: It is missing or damaged.
    """
    name = how.captioner.name
    if not name.startswith(OWN):
        return references.image_captioner(how.captioner, how.plugins)
    # Not above: it brings spaCy, which takes seconds to import and all other workers do without.
    from milan_ray.labelers.dnd.unit_captioner import WholeImages
    from milan_ray.stages.captioners import load_captioner

    load_plugins(how.plugins)
    captioner = load_captioner(storage, name.removeprefix(OWN))
    return WholeImages(name, captioner, captioner.encoder())


def drawings_identity(storage: Storage, how: DndConfig) -> dict[str, object]:
    """All that decides drawings besides the exemplars; sees that every piece is there before anything starts.

    Raises:
        MilanError: A captioner, summariser, generator or model of images and texts is missing.
    """
    embedder = None if how.embedder is None else references.image_text(how.embedder, how.plugins)
    if embedder is not None and embedder.view is None:
        raise MilanError(
            "a model that reads a probe's concept maps cannot look at drawn images: name a CLIP or SigLIP model with "
            "--clip, or score by topk-squared-mean."
        )
    return {
        "kernel": KERNEL_VERSION,
        "captioner": config_hash(image_captioner(storage, how).identity()),
        "summariser": config_hash(how.summariser.load(storage).identity()),
        "generator": config_hash(references.generator(how.generator, how.plugins).identity()),
        "embedder": None if embedder is None else config_hash(embedder.identity()),
        "augmentation": {"images": how.images, "crops": how.crops, "pooling": how.pooling},
        "drawing": {"images": how.drawn, "prompt": how.prompt, "seed": how.seed},
    }


def drawings_fingerprint(identity: Mapping[str, object], exemplars: str, units: tuple[int, ...]) -> Fingerprint:
    """What decides a layer's drawings.

    Args:
        identity: As :func:`drawings_identity` gives it.
        exemplars: Configuration hash of the layer's exemplars, which covers weights and probe.
        units: The units selected; empty for all.
    """
    return Fingerprint.of({**identity, "exemplars": exemplars}, units)


class Drawings(Stage):
    """Candidate labels of some layers with the images drawn of them; :func:`run_dnd` makes a model's together.

    Args:
        models: Model name → layers.
        how: How to describe.
        identity: As :func:`drawings_identity` gives it.
        units: The units of every layer to describe; empty for all.
    """

    table = DRAWINGS

    def __init__(
        self, models: Layers, how: DndConfig, identity: Mapping[str, object], units: tuple[int, ...] = ()
    ) -> None:
        self._models, self._identity, self._units = models, identity, units
        self.name = self.title = how.labeler.name

    def outputs(self, known: Known) -> Iterator[Output]:
        """Drawings of every layer, by what its exemplars are."""
        for model, layer in pairs(self._models):
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            known.check_units(self._units, model, layer)
            fingerprint = drawings_fingerprint(self._identity, exemplars, self._units)
            yield Output({"labeler": self.name, "model": model, "layer": layer}, fingerprint)


class DrawnLabels(TaskStage):
    """Labels of some layers, chosen by what their units make of the drawings.

    Args:
        models: Model name → layers.
        labeler: Who chooses.
        units: The units of every layer to describe; empty for all.
    """

    table = DESCRIPTIONS

    def __init__(self, models: Layers, labeler: DescribeAndDissect, units: tuple[int, ...] = ()) -> None:
        self._models, self._labeler, self._units = models, labeler, units
        self.name = self.title = labeler.name

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer, by what its drawings are."""
        for model, layer in pairs(self._models):
            keys = {"labeler": self.name, "model": model, "layer": layer}
            parts = {**self._labeler.identity(), "drawings": known.all_units(DRAWINGS, **keys)}
            yield Output(keys, Fingerprint.of(parts, self._units))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """A layer's labels."""
        from milan_ray.stages.descriptions import described  # with its captioner, which workers can do without

        drawn = read_drawings(storage, self.name, output.model, output.layer, self._units)
        exemplars = storage.config_of(EXEMPLARS, model=output.model, layer=output.layer)
        return described(output, self._labeler, self._labeler.label(Evidence(drawn=drawn)), exemplars)

    def few(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """Choosing is sorting some numbers."""
        return True


@dataclass(frozen=True)
class _Work:
    """One model's drawings to make.

    Attributes:
        item: What a worker must know of the model; its layers are those to do.
        how: How.
        identity: Digests that every worker's pieces must have.
        units: The units selected; empty for all.
        blocks: Layer → its blocks of units, by name.
    """

    item: ModelWork
    how: DndConfig
    identity: Mapping[str, object]
    units: tuple[int, ...]
    blocks: Mapping[str, Sequence[str]]


@retry_if_overtaken
def run_dnd(
    storage: Storage,
    dissected: DissectedModels,
    models: Sequence[references.ModelRef],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: DndConfig,
    resources: Resources,
    units: tuple[int, ...] = (),
    identity: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """Describes and dissects every unit of every layer where that is missing or stale.

    Args:
        storage: The run directory, which holds exemplars and pooled activations.
        dissected: What :func:`milan_ray.stages.exemplars.run_exemplars` left there.
        models: The models dissected.
        probe: The probe images.
        config: How they were dissected.
        how: How to describe.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to describe; empty for all.
        identity: What :func:`drawings_identity` says, where that was asked before the exemplars were made.

    Returns:
        Model → why it could not be described.

    Raises:
        MilanError: A captioner, summariser, generator or model of images and texts is missing, or every model failed.
    """
    identity = drawings_identity(storage, how) if identity is None else identity
    failed: dict[str, str] = {}
    for ref in dict.fromkeys(models):
        if ref.name not in dissected.models:
            continue
        try:
            _run_model(storage, ref, dissected.probe, probe, config, how, identity, resources, units)
        except WorkRemovedError:
            raise
        except MilanError as error:
            failed[ref.name] = str(error)
    all_failed(failed, len(dissected.models))
    return failed


def _run_model(
    storage: Storage,
    ref: references.ModelRef,
    digest: str,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: DndConfig,
    identity: Mapping[str, object],
    resources: Resources,
    units: tuple[int, ...],
) -> None:
    spec = references.model(ref)
    if spec.images is not None:
        raise MilanError(f"{spec.name} generates images; Describe-and-Dissect shows images to models: choose another.")
    labeler = how.labeler
    layers = {spec.name: spec.layers}
    every = Drawings(layers, how, identity, units).outputs(Known(storage))
    fingerprints = {output.layer: output.fingerprint for output in every}
    # Over all layers, so that a job killed while results become public finds its work again.
    work = config_hash(
        {"model": spec.name, "drawings": {layer: fingerprint.hash for layer, fingerprint in fingerprints.items()}}
    )
    missing = tuple(
        layer
        for layer, fingerprint in fingerprints.items()
        if storage.why(DRAWINGS, fingerprint, labeler=labeler.name, model=spec.name, layer=layer)
    )
    if missing:
        model = describe_model(spec, references.probe(probe), digest, config)
        images = storage.count(MANIFEST, probe=digest)
        plan = Plan(images, config.k, config.quantile, config.samples, config.map_budget)
        item = ModelWork(
            ref, model.weights, spec.layers, missing, digest, work, plan, {}, {}, model.view, model.layouts
        )
        _draw_all(storage, item, probe, config, how, identity, fingerprints, resources, units)
    storage.remove_work(work)
    labels = DrawnLabels(layers, labeler, units)
    if not missing and not due(labels, storage):
        say(f"{labeler.name} of {spec.name}: all up to date")
    run_stage(labels, storage, resources)


def read_drawings(
    storage: Storage, labeler: str, model: str, layer: str, units: tuple[int, ...] = ()
) -> dict[int, list[Drawn]]:
    """Unit → its candidates with the images drawn for them, in the order in which they were proposed.

    Args:
        storage: The run directory.
        labeler: The labeler's name, with its tag.
        model: Name of the model.
        layer: Module path.
        units: The units wanted; empty for all.
    """
    table = storage.read(DRAWINGS, labeler=labeler, model=model, layer=layer)
    found: dict[int, list[Drawn]] = defaultdict(list)
    for row in table.sort_by([("unit", "ascending"), ("place", "ascending")]).to_pylist():
        if not units or row["unit"] in units:
            similar = row["similarities"]
            cosines = None if similar is None else np.array(similar, np.float32)
            found[row["unit"]].append(Drawn(row["text"], np.array(row["activations"], np.float32), cosines))
    return dict(found)


def _draw_all(
    storage: Storage,
    item: ModelWork,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: DndConfig,
    identity: Mapping[str, object],
    fingerprints: Mapping[str, Fingerprint],
    resources: Resources,
    units: tuple[int, ...],
) -> None:
    """Runs the stages one after the other and makes the drawings of a model's layers public."""
    name = item.model.name
    few = item.plan.images <= FEW_IMAGES
    tasks = [_Top(storage, item, layer, how.images, how.pooling, units) for layer in item.layers]
    found: dict[str, list[int]] = {}
    for index, present in run_parallel(_top, tasks, here=few):
        found[item.layers[index]] = present
    blocks: dict[str, list[str]] = {}
    rows: list[Row] = []
    for layer, present in found.items():
        starts = range(0, len(present), UNITS)
        parts = [present[start : start + UNITS] for start in starts]
        blocks[layer] = [f"{item.folder(layer)}/{config_hash({'units': part})}" for part in parts]
        rows += [
            {"model": 0, "images": len(part), "layer": layer, "block": block, "units": part}
            for block, part in zip(blocks[layer], parts, strict=True)
        ]
    work = _Work(item, how, identity, units, blocks)
    count = sum(map(len, found.values()))
    pieces = ", ".join((how.captioner.name, how.summariser.name, how.generator.name))
    say(f"{how.labeler.name}: {count} units of {name} by {pieces}")
    clock = _Clock(storage, work, resources)
    modelled = {
        "storage": storage,
        "work": [item],
        "probe": probe,
        "config": config,
        "threads": resources.threads,
        "device": resources.device,
        "dnd": work,
    }
    plain = {"storage": storage, "work": work, "threads": resources.threads, "device": resources.device}
    clock.run("augmented", AugmentWorker, modelled, rows)
    clock.run("captions", CaptionWorker, plain, rows)
    clock.run("candidates", SummariseWorker, plain, rows, here=how.summariser.is_server)
    drawing = _chunks(storage, work)
    clock.run("drawn", DrawWorker, modelled, drawing)
    images = sum(row["images"] for row in drawing)
    for layer in item.layers:
        cost = Cost(clock.seconds * len(found[layer]) / max(1, count), clock.seconds, images)  # shared by units
        _publish(storage, work, layer, fingerprints[layer], [row["block"] for row in drawing], cost)
    say(f"{how.labeler.name} of {name}: {clock.text(count)}")


class _Clock:
    """Runs stages, each as far as it is not done, and adds up what they take."""

    def __init__(self, storage: Storage, work: _Work, resources: Resources) -> None:
        self._storage, self._work, self._resources = storage, work, resources
        self._parts: dict[str, float] = {}
        self.seconds = 0.0

    def run(
        self, stage: str, worker: Callable[..., Any], arguments: dict[str, Any], rows: Sequence[Row], here: bool = False
    ) -> None:
        """Runs a stage on the rows whose result is not stored: on a pool of actors, or ``here``.

        Raises:
            MilanError: As a worker raised it.
        """
        item = self._work.item
        stored = set(self._storage.work_names(item.work, stage))
        fresh = [row for row in rows if f"{stage}/{row['block']}" not in stored]
        if len(fresh) < len(rows):
            say(f"{stage} of {item.model.name}: {len(rows) - len(fresh)} of {len(rows)} blocks are done already")
        answers = self._here(worker, arguments, fresh) if here else run_pool(worker, arguments, fresh, self._resources)
        unit = "images" if stage == "drawn" else "units"
        taken = 0.0
        with Progress(stage, sum(row["images"] for row in fresh), unit) as progress:
            for answer in answers:
                if answer.get("error"):
                    raise MilanError(answer["error"])
                progress.advance(answer["images"])
                taken += answer["seconds"]
        self._parts[stage] = taken
        self.seconds += taken

    @staticmethod
    def _here(worker: Callable[..., Any], arguments: dict[str, Any], rows: Sequence[Row]) -> Any:
        if not rows:
            return
        threads = torch.get_num_threads()
        try:
            working = worker(**arguments)
            for row in rows:
                started = time.monotonic()
                yield {**working(row), "seconds": time.monotonic() - started}
            if isinstance(working, SummariseWorker):
                working.close()
        finally:
            torch.set_num_threads(threads)

    def text(self, units: int) -> str:
        """Seconds per unit and stage."""
        parts = ", ".join(f"{stage} {taken / max(1, units):.2f}" for stage, taken in self._parts.items())
        return f"seconds per unit: {parts}"


# -- step 1: what excites a unit ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Top:
    storage: Storage
    item: ModelWork
    layer: str
    count: int
    pooling: str
    units: tuple[int, ...]


def _top(task: _Top) -> list[int]:
    """Finds the images with the highest pooled activation of every unit of a layer; returns the units that have any."""
    storage, item = task.storage, task.item
    ids = np.zeros((0, 0), np.int64)
    values = np.zeros((0, 0), np.float32)
    for piece in storage.stream(POOLED, ["image_id", task.pooling], model=item.model.name, layer=task.layer):
        more = matrix(piece[task.pooling]).T  # (U, n)
        chosen = list(task.units) or slice(None)
        more = np.where(np.isfinite(more), more, -np.inf)[chosen]
        fresh = np.broadcast_to(piece["image_id"].to_numpy(), more.shape)
        values = np.concatenate([values, more], axis=1) if values.size else more
        ids = np.concatenate([ids, fresh], axis=1) if ids.size else fresh
        best = np.argsort(-values, axis=1, kind="stable")[:, : task.count]  # equal ones stay in the manifest's order
        values, ids = np.take_along_axis(values, best, axis=1), np.take_along_axis(ids, best, axis=1)
    numbers = np.array(task.units or range(len(values)), np.int64)
    unit, place = np.nonzero(np.isfinite(values))
    chosen_ids = ids[unit, place]
    manifest = storage.read(MANIFEST, ["image_id", "root", "path"], probe=item.probe)
    refs = manifest.take(pc.index_in(pa.array(chosen_ids), manifest["image_id"].combine_chunks()))
    columns = [pa.array(numbers[unit], pa.int32()), *(refs[name] for name in _TOP_SCHEMA.names[1:])]
    storage.put_work(item.work, f"top/{item.folder(task.layer)}", pa.table(columns, schema=_TOP_SCHEMA))
    return sorted(set(numbers[unit].tolist()))


def _checked(piece: Any, expected: object, what: str) -> Any:
    """The piece, when it is the one that the job was started with.

    Raises:
        MilanError: It is another one on this machine.
    """
    if config_hash(piece.identity()) != expected:
        raise MilanError(
            f"the {what} on {platform.node()} is another one than where the job was started; every node must see the "
            "same files."
        )
    return piece


class _DndWorker(ModelWorker):
    """An actor with the model, and what looks at its images."""

    def __init__(self, dnd: _Work, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._dnd = dnd
        how = dnd.how
        self._embedder = None
        if how.embedder is not None:
            embedder = references.image_text(how.embedder, how.plugins)
            self._embedder = _checked(embedder, dnd.identity["embedder"], "model of images and texts").to(self._device)

    def _maps(self, forward: Forward, spec: ModelSpec, views: np.ndarray, layer: str, units: list[int]) -> torch.Tensor:
        """The maps (N, units, h, w) of some views, on the CPU."""
        size = self._pass_size(spec)
        parts = [
            forward.maps(views[start : start + size])[layer][:, units].cpu() for start in range(0, len(views), size)
        ]
        return torch.cat(parts)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        """Embeddings of images uint8 (N, H, W, 3), of length 1: float32 (N, D)."""
        assert self._embedder is not None
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float() * (1 / 255)
        with torch.inference_mode():
            found = self._embedder.embed_images(pixels).float()
            return torch.nn.functional.normalize(found, dim=1).cpu().numpy()


class AugmentWorker(_DndWorker):
    """Crops what excites units out of their images, and keeps the most exciting images and crops."""

    def _run(self, row: Row) -> None:
        item = self._work[0]
        layer, units = row["layer"], row["units"]
        spec, forward = self._forward(0)
        top = self._storage.get_work(item.work, f"top/{item.folder(layer)}")
        top = top.filter(pc.is_in(top["unit"], pa.array(units, pa.int32())))
        refs = {ref["image_id"]: ImageRef(ref["image_id"], ref["root"], ref["path"]) for ref in top.to_pylist()}
        ids = sorted(refs)
        views = self._read([refs[image_id] for image_id in ids], spec)
        maps = self._maps(forward, spec, views, layer, units)
        slot = {image_id: place for place, image_id in enumerate(ids)}
        members: dict[int, list[int]] = defaultdict(list)
        for one in top.to_pylist():
            members[one["unit"]].append(one["image_id"])
        rows: list[dict[str, object]] = []
        anchors: list[dict[str, object]] = []
        for column, unit in enumerate(units):
            chosen = self._augment(unit, column, members[unit], slot, views, maps, forward, spec, layer)
            rows += chosen
            if self._embedder is not None:
                images = np.stack([np.asarray(one.pop("pixels")) for one in chosen])
                anchors.append({"unit": unit, "embedding": self._embed(images).mean(axis=0).tolist()})
            else:
                for one in chosen:
                    one.pop("pixels")
        block = row["block"]
        anchored = pa.Table.from_pylist(anchors, schema=_ANCHORS_SCHEMA)
        self._storage.put_work(item.work, f"anchors/{block}", anchored)
        self._storage.put_work(item.work, f"augmented/{block}", pa.Table.from_pylist(rows, schema=_AUGMENTED_SCHEMA))

    def _read(self, refs: list[ImageRef], spec: ModelSpec) -> np.ndarray:
        if spec.bands not in (None, 3):
            raise MilanError(f"{spec.name} takes {spec.bands} bands: crops are made, and captioned, in RGB alone.")
        batch = read_inputs(self._probe, refs, spec)
        return batch.complete("was read before but not now ({reason}); run the job again.").views

    def _augment(
        self,
        unit: int,
        column: int,
        ids: list[int],
        slot: Mapping[int, int],
        views: np.ndarray,
        maps: torch.Tensor,
        forward: Forward,
        spec: ModelSpec,
        layer: str,
    ) -> list[dict[str, object]]:
        """The most exciting of a unit's images and their attention crops, the first first."""
        how = self._dnd.how
        places = [slot[image_id] for image_id in ids]
        boxes = [
            (place, image_id, box)
            for place, image_id in zip(places, ids, strict=True)
            for box in attention_boxes(maps[place, column], spec.preprocess.view.shape, how.crops)
        ]
        images = [views[place] for place in places] + [crop(views[place], box) for place, _, box in boxes]
        pool = POOLINGS[how.pooling]
        values = pool(maps[places, column][:, None])[:, 0]
        if boxes:
            cut = self._maps(forward, spec, np.stack(images[len(places) :]), layer, [unit])
            values = torch.cat([values, pool(cut)[:, 0]])
        origin: list[tuple[int, list[int] | None]] = [(image_id, None) for image_id in ids]
        origin += [(image_id, list(box)) for _, image_id, box in boxes]
        best = torch.nan_to_num(values, nan=-torch.inf).argsort(descending=True, stable=True)[: how.images].tolist()
        return [
            {
                "unit": unit,
                "image_id": origin[place][0],
                "box": origin[place][1],
                "activation": float(values[place]),
                "image": png(images[place]),
                "pixels": images[place],
            }
            for place in best
        ]


# -- step 2: what it is called --------------------------------------------------------------------------------


class _TextWorker:
    """An actor that turns a block's table into texts."""

    source, stage = "", ""

    def __init__(self, storage: Storage, work: _Work, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work = storage, work
        self._device = resolve_device(device)

    def __call__(self, row: Row) -> Row:
        """Runs one block."""
        item = self._work.item
        table = self._storage.get_work(item.work, f"{self.source}/{row['block']}")
        column = table.column_names[-1]
        texts: list[dict[str, object]] = []
        for unit in row["units"]:
            mine = table.filter(pc.equal(table["unit"], unit))[column].to_pylist()
            texts += [{"unit": unit, "text": text} for text in self._texts(mine)]
        found = pa.Table.from_pylist(texts, schema=_TEXTS_SCHEMA)
        self._storage.put_work(item.work, f"{self.stage}/{row['block']}", found)
        return {"images": row["images"]}

    def _texts(self, values: list[Any]) -> list[str]:
        raise NotImplementedError


class CaptionWorker(_TextWorker):
    """Captions the images and crops of units."""

    source, stage = "augmented", "captions"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        captioner = image_captioner(self._storage, self._work.how)
        self._captioner = _checked(captioner, self._work.identity["captioner"], "captioner of images").to(self._device)

    def _texts(self, values: list[bytes]) -> list[str]:
        return self._captioner.caption([decode(value) for value in values])


class SummariseWorker(_TextWorker):
    """Turns the captions of units into candidate labels."""

    source, stage = "captions", "candidates"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        summariser = self._work.how.summariser.load(self._storage)
        self._summariser: Summariser = _checked(summariser, self._work.identity["summariser"], "language model")
        self._chat = summariser.chat.to(self._device) if isinstance(summariser, Prompted) else None

    def _texts(self, values: list[str]) -> list[str]:
        return self._summariser.candidates(values)

    def close(self) -> None:
        """Says what a server was asked."""
        if isinstance(self._chat, Endpoint):
            self._chat.say_usage()


# -- step 3: what fits ----------------------------------------------------------------------------------------


def _chunks(storage: Storage, work: _Work) -> list[Row]:
    """Sorts all candidates by text, so that each distinct one is drawn once for all units and layers of the model."""
    item = work.item
    wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, layer in enumerate(item.every):
        for block in work.blocks.get(layer, ()):
            for row in storage.get_work(item.work, f"candidates/{block}").to_pylist():
                wanted[row["text"]].append((number, row["unit"]))
    texts = sorted(wanted)
    rows: list[Row] = []
    stored = set(storage.work_names(item.work, "wanted"))
    for start in range(0, len(texts), LABELS):
        some = texts[start : start + LABELS]
        name = config_hash({"texts": some})
        asked = [{"text": text, "layer": layer, "unit": unit} for text in some for layer, unit in wanted[text]]
        if f"wanted/{name}" not in stored:
            storage.put_work(item.work, f"wanted/{name}", pa.Table.from_pylist(asked, schema=_WANTED_SCHEMA))
        rows.append({"model": 0, "block": name, "texts": some, "images": len(some) * work.how.drawn})
    return rows


class DrawWorker(_DndWorker):
    """Draws images of candidate labels and sees what the units that may be called so make of them."""

    runs = "the generator or the model"

    def __init__(self, dnd: _Work, **arguments: Any) -> None:
        super().__init__(dnd, **arguments)
        generator = references.generator(dnd.how.generator, dnd.how.plugins)
        self._generator = _checked(generator, dnd.identity["generator"], "generator").to(self._device)
        self._anchors: dict[int, dict[int, np.ndarray]] = {}

    def _run(self, row: Row) -> None:
        item, how = self._work[0], self._dnd.how
        spec, forward = self._forward(0)
        pool = POOLINGS[how.pooling]
        wanted = self._storage.get_work(item.work, f"wanted/{row['block']}").to_pylist()
        rows: list[dict[str, object]] = []
        for text in row["texts"]:
            images = self._generator.generate(how.prompt.replace("{}", text), how.drawn, how.seed)
            views = np.stack([spec.preprocess.view(Image.fromarray(image)) for image in images])
            size = self._pass_size(spec)
            parts = [forward.maps(views[start : start + size]) for start in range(0, len(views), size)]
            pooled = {layer: torch.cat([pool(part[layer]) for part in parts]).cpu().numpy() for layer in item.read}
            embedded = None if self._embedder is None else self._embed(images)
            for asked in wanted:
                if asked["text"] != text:
                    continue
                activations = pooled[item.every[asked["layer"]]][:, asked["unit"]]
                similar = None
                if embedded is not None:
                    similar = (embedded @ self._anchor(asked["layer"], asked["unit"])).tolist()
                rows.append({**asked, "activations": activations.tolist(), "similarities": similar})
        self._storage.put_work(item.work, f"drawn/{row['block']}", pa.Table.from_pylist(rows, schema=_DRAWN_SCHEMA))

    def _anchor(self, number: int, unit: int) -> np.ndarray:
        """The mean embedding of a unit's images and crops: products with it are mean cosines."""
        if number not in self._anchors:
            item = self._work[0]
            tables = (
                self._storage.get_work(item.work, f"anchors/{block}") for block in self._dnd.blocks[item.every[number]]
            )
            self._anchors[number] = {
                row["unit"]: np.array(row["embedding"], np.float32) for table in tables for row in table.to_pylist()
            }
        return self._anchors[number][unit]


def _publish(
    storage: Storage, work: _Work, layer: str, fingerprint: Fingerprint, chunks: Sequence[str], cost: Cost
) -> None:
    """Puts a layer's drawings together and makes them public."""
    item = work.item
    number = item.every.index(layer)
    drawn = pa.concat_tables(
        [_DRAWN_SCHEMA.empty_table(), *(storage.get_work(item.work, f"drawn/{chunk}") for chunk in chunks)]
    )
    drawn = drawn.filter(pc.equal(drawn["layer"], number))
    found = {(row["unit"], row["text"]): row for row in drawn.to_pylist()}
    keys = {"labeler": work.how.labeler.name, "model": item.model.name, "layer": layer}
    rows: list[dict[str, object]] = []
    for block in work.blocks[layer]:
        places: dict[int, int] = defaultdict(int)
        for asked in storage.get_work(item.work, f"candidates/{block}").to_pylist():
            unit = asked["unit"]
            row = found[unit, asked["text"]]
            rows.append(
                {
                    **keys,
                    "unit": unit,
                    "place": places[unit],
                    "text": row["text"],
                    "activations": row["activations"],
                    "similarities": row["similarities"],
                }
            )
            places[unit] += 1
    rows.sort(key=lambda row: (row["unit"], row["place"]))
    metadata = {EXEMPLARS_KEY: storage.config_of(EXEMPLARS, model=item.model.name, layer=layer)}
    table = pa.Table.from_pylist(rows, schema=DRAWINGS.schema.with_metadata(metadata))
    record_run(storage, keys["labeler"], fingerprint.hash, item.model.name, layer=layer, rows=len(rows), cost=cost)
    storage.write(DRAWINGS, table, fingerprint, **keys)
