"""Workers of Describe-and-Dissect: each turns a block of units, or a few candidate labels, into a piece of the work."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from milan_ray.config import config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import read_inputs
from milan_ray.exemplars.pooled import matrix
from milan_ray.labelers.dnd.crops import attention_boxes, crop
from milan_ray.labelers.dnd.summaries import Prompted, Summariser
from milan_ray.models.chat import Endpoint
from milan_ray.models.image_text import Embedder
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageRef
from milan_ray.schema import MANIFEST, POOLED
from milan_ray.stages.dnd.config import POOLINGS, DndConfig, image_captioner
from milan_ray.stages.dnd.passes import fits, pooled_values, unit_maps, unit_vectors
from milan_ray.stages.embeddings import image_embeddings
from milan_ray.stages.exemplars import ModelWork, ModelWorker
from milan_ray.stages.images import png
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import decode

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
WANTED_SCHEMA = pa.schema([("text", pa.string()), ("layer", pa.int32()), ("unit", pa.int32())])
DRAWN_SCHEMA = pa.schema(
    [*WANTED_SCHEMA, ("activations", pa.list_(pa.float32())), ("similarities", pa.list_(pa.float32()))]
)


@dataclass(frozen=True)
class DndWork:
    """Drawings of one model to make.

    Attributes:
        item: What a worker must know of the model; its layers are those that are due.
        how: How to describe.
        identity: Digests that every worker's pieces must have.
        units: The units selected; empty for all.
        blocks: Layer → its blocks of units, by name.
    """

    item: ModelWork
    how: DndConfig
    identity: Mapping[str, object]
    units: tuple[int, ...]
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_top(storage: Storage, work: DndWork, layer: str) -> list[int]:
    """Stores the images with the highest pooled activation of every unit of a layer; returns the units with any."""
    item, pooling = work.item, work.how.pooling
    ids = np.zeros((0, 0), np.int64)
    values = np.zeros((0, 0), np.float32)
    for piece in storage.stream(POOLED, ["image_id", pooling], model=item.model.name, layer=layer):
        more = matrix(piece[pooling]).T  # (U, n)
        chosen = list(work.units) or slice(None)
        more = np.where(np.isfinite(more), more, -np.inf)[chosen]
        fresh = np.broadcast_to(piece["image_id"].to_numpy(), more.shape)
        values = np.concatenate([values, more], axis=1) if values.size else more
        ids = np.concatenate([ids, fresh], axis=1) if ids.size else fresh
        best = np.argsort(-values, axis=1, kind="stable")[
            :, : work.how.images
        ]  # equal ones stay in the manifest's order
        values, ids = np.take_along_axis(values, best, axis=1), np.take_along_axis(ids, best, axis=1)
    numbers = np.array(work.units or range(len(values)), np.int64)
    unit, place = np.nonzero(np.isfinite(values))
    chosen_ids = ids[unit, place]
    manifest = storage.read(MANIFEST, ["image_id", "root", "path"], probe=item.probe)
    refs = manifest.take(pc.index_in(pa.array(chosen_ids), manifest["image_id"].combine_chunks()))
    columns = [pa.array(numbers[unit], pa.int32()), *(refs[name] for name in _TOP_SCHEMA.names[1:])]
    storage.put_work(item.work, f"top/{item.part(layer)}", pa.table(columns, schema=_TOP_SCHEMA))
    return sorted(set(numbers[unit].tolist()))


def _checked(piece: Any, expected: object, what: str) -> Any:
    """Returns a loaded model after checking that it is the one that the job was started with.

    Raises:
        MilanError: This machine has another one.
    """
    if config_hash(piece.identity()) != expected:
        raise MilanError(
            f"the {what} on {platform.node()} is another one than where the job was started; every node must see the "
            "same files."
        )
    return piece


class _DndWorker(ModelWorker):
    """An actor with the model, and the model of images and texts where images are compared."""

    def __init__(self, dnd: DndWork, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._dnd = dnd
        how = dnd.how
        self._embedder = None
        if how.embedder is not None:
            embedder = references.load(how.embedder, how.plugins)
            self._embedder = _checked(embedder, dnd.identity["embedder"], "model of images and texts").to(self._device)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        assert self._embedder is not None
        return unit_vectors(self._embedder, images, self._device)


class AugmentWorker(_DndWorker):
    """Crops the regions that activate units out of their images; keeps the images and crops that activate them most."""

    def _run(self, row: Row) -> None:
        item = self._work[0]
        layer, units = row["layer"], row["units"]
        spec, forward = self._forward(0)
        top = self._storage.get_work(item.work, f"top/{item.part(layer)}")
        top = top.filter(pc.is_in(top["unit"], pa.array(units, pa.int32())))
        refs = {ref["image_id"]: ImageRef(ref["image_id"], ref["root"], ref["path"]) for ref in top.to_pylist()}
        ids = sorted(refs)
        views = self._read([refs[image_id] for image_id in ids], spec)
        maps = unit_maps(forward, views, layer, units, self._pass_size(spec))
        members: dict[int, list[int]] = defaultdict(list)
        for place in top.to_pylist():
            members[place["unit"]].append(place["image_id"])
        rows: list[dict[str, object]] = []
        anchors: list[dict[str, object]] = []
        for column, unit in enumerate(units):
            places = [ids.index(image_id) for image_id in members[unit]]
            chosen, images = self._augment(members[unit], views[places], maps[places, column], layer, unit)
            rows += chosen
            if self._embedder is not None:
                anchors.append({"unit": unit, "embedding": self._embed(images).mean(axis=0).tolist()})
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
        self, ids: list[int], views: np.ndarray, maps: torch.Tensor, layer: str, unit: int
    ) -> tuple[list[dict[str, object]], np.ndarray]:
        """Chooses the images and attention crops that activate a unit most, in descending order.

        Args:
            ids: The n images.
            views: Their pixels, uint8 (n, H, W, 3).
            maps: The unit's maps of them, (n, h, w).
            layer: The unit's layer.
            unit: The unit.

        Returns:
            Rows of the table of augmented images, and their pixels.
        """
        how = self._dnd.how
        spec, forward = self._forward(0)
        boxes = [
            (place, box)
            for place in range(len(ids))
            for box in attention_boxes(maps[place], spec.preprocess.view.shape, how.crops)
        ]
        images = [*views, *(crop(views[place], box) for place, box in boxes)]
        pool = POOLINGS[how.pooling]
        values = pool(maps[:, None])[:, 0]
        if boxes:
            cut = unit_maps(forward, np.stack(images[len(ids) :]), layer, [unit], self._pass_size(spec))
            values = torch.cat([values, pool(cut)[:, 0]])
        origin: list[tuple[int, list[int] | None]] = [(image_id, None) for image_id in ids]
        origin += [(ids[place], list(box)) for place, box in boxes]
        best = torch.nan_to_num(values, nan=-torch.inf).argsort(descending=True, stable=True)[: how.images].tolist()
        rows: list[dict[str, object]] = [
            {
                "unit": unit,
                "image_id": origin[place][0],
                "box": origin[place][1],
                "activation": float(values[place]),
                "image": png(images[place]),
            }
            for place in best
        ]
        return rows, np.stack([images[place] for place in best])


class _TextWorker:
    """An actor that turns a block's table into texts."""

    source, stage = "", ""

    def __init__(self, storage: Storage, work: DndWork, threads: int, device: str) -> None:
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
            of_unit = table.filter(pc.equal(table["unit"], unit))[column].to_pylist()
            texts += [{"unit": unit, "text": text} for text in self._texts(of_unit)]
        piece = pa.Table.from_pylist(texts, schema=_TEXTS_SCHEMA)
        self._storage.put_work(item.work, f"{self.stage}/{row['block']}", piece)
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
        """Prints the usage of a server."""
        if isinstance(self._chat, Endpoint):
            self._chat.say_usage()


class FindWorker:
    """Finds the probe images that fit candidate labels best, and looks up the activations of the units for them.

    A unit's images with the highest activations are left out: the candidates are about them.
    """

    def __init__(self, storage: Storage, work: DndWork, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        how = work.how
        assert how.embedder is not None  # checked by the configuration
        embedder = references.load(how.embedder, how.plugins)
        checked = _checked(embedder, work.identity["embedder"], "model of images and texts")
        self._embedder: Embedder = checked.to(resolve_device(device))
        self._storage, self._work = storage, work
        self._ids, self._vectors = image_embeddings(storage, how.embedder.name, work.item.probe)
        self._vectors = _unit(self._vectors)

    def __call__(self, row: Row) -> Row:
        """Runs one block of labels.

        Raises:
            MilanError: The probe has no other image than the unit's own.
        """
        item, texts = self._work.item, row["texts"]
        wanted = self._storage.get_work(item.work, f"wanted/{row['block']}").to_pylist()
        by_text = dict(zip(texts, fits(self._embedder, self._vectors, texts).T, strict=True))
        rows: list[dict[str, object]] = []
        for number in sorted({asked["layer"] for asked in wanted}):
            asked_here = [asked for asked in wanted if asked["layer"] == number]
            rows += self._of_layer(item.every[number], asked_here, by_text)
        self._storage.put_work(item.work, f"drawn/{row['block']}", pa.Table.from_pylist(rows, schema=DRAWN_SCHEMA))
        return {"images": row["images"]}

    def _of_layer(
        self, layer: str, wanted: Sequence[dict[str, Any]], by_text: Mapping[str, np.ndarray]
    ) -> list[dict[str, object]]:
        """Activations and cosines of a layer's candidates.

        Args:
            layer: The layer.
            wanted: Texts and units.
            by_text: Text → how well each embedded image fits it, (N,).
        """
        item, how = self._work.item, self._work.how
        top = self._storage.get_work(item.work, f"top/{item.part(layer)}")
        anchors = read_anchors(self._storage, self._work, layer)
        pooled = self._storage.stream(POOLED, ["image_id"], model=item.model.name, layer=layer)
        read = np.isin(self._ids, np.concatenate([piece["image_id"].to_numpy() for piece in pooled]))
        most = how.drawn + how.images  # a unit's own may be among the best
        best = {
            text: np.argsort(np.where(read, -by_text[text], np.inf), kind="stable")[: min(most, read.sum())]
            for text in {asked["text"] for asked in wanted}
        }
        places: list[np.ndarray] = []
        for asked in wanted:
            own = top.filter(pc.equal(top["unit"], asked["unit"]))["image_id"].to_numpy()
            of = best[asked["text"]]
            places.append(of[~np.isin(self._ids[of], own)][: how.drawn])
            if not len(places[-1]):
                raise MilanError(
                    f"unit {asked['unit']} of {layer} has no probe image beside the {len(own)} that its captions are "
                    "about: give a larger probe, a smaller --top, or a generator."
                )
        activations = self._activations(layer, [asked["unit"] for asked in wanted], [self._ids[of] for of in places])
        return [
            {
                **asked,
                "activations": values.tolist(),
                "similarities": (self._vectors[of] @ anchors[asked["unit"]]).tolist(),
            }
            for asked, of, values in zip(wanted, places, activations, strict=True)
        ]

    def _activations(self, layer: str, units: Sequence[int], image_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each unit's pooled activations on its images, (n,) each; holds a row group of ``pooled`` at a time."""
        item, pooling = self._work.item, self._work.how.pooling
        ids = np.concatenate(image_ids)
        columns = np.repeat(np.array(units), [len(of) for of in image_ids])
        found = np.full(len(ids), np.nan, np.float32)
        for piece in self._storage.stream(POOLED, ["image_id", pooling], model=item.model.name, layer=layer):
            row_of = {image_id: row for row, image_id in enumerate(piece["image_id"].to_pylist())}
            here = np.flatnonzero(np.isin(ids, piece["image_id"].to_numpy()))
            rows = [row_of[image_id] for image_id in ids[here].tolist()]
            found[here] = matrix(piece[pooling])[rows, columns[here]]
        return np.split(found, np.cumsum([len(of) for of in image_ids])[:-1])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) at length 1; zeros stay."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1).numpy()


def read_anchors(storage: Storage, work: DndWork, layer: str) -> dict[int, np.ndarray]:
    """Unit → the mean embedding of its images and crops: products with it are mean cosines."""
    tables = (storage.get_work(work.item.work, f"anchors/{block}") for block in work.blocks[layer])
    return {row["unit"]: np.array(row["embedding"], np.float32) for table in tables for row in table.to_pylist()}


class DrawWorker(_DndWorker):
    """Generates images of candidate labels, and computes the activations of the units that have these candidates."""

    runs = "the generator or the model"

    def __init__(self, dnd: DndWork, **arguments: Any) -> None:
        super().__init__(dnd, **arguments)
        assert dnd.how.generator is not None  # or images are found
        generator = references.load(dnd.how.generator, dnd.how.plugins)
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
            pooled = pooled_values(forward, views, pool, self._pass_size(spec))
            embedded = None if self._embedder is None else self._embed(images)
            for asked in wanted:
                if asked["text"] != text:
                    continue
                activations = pooled[item.every[asked["layer"]]][:, asked["unit"]]
                similar = None
                if embedded is not None:
                    similar = (embedded @ self._anchor(asked["layer"], asked["unit"])).tolist()
                rows.append({**asked, "activations": activations.tolist(), "similarities": similar})
        self._storage.put_work(item.work, f"drawn/{row['block']}", pa.Table.from_pylist(rows, schema=DRAWN_SCHEMA))

    def _anchor(self, number: int, unit: int) -> np.ndarray:
        if number not in self._anchors:
            self._anchors[number] = read_anchors(self._storage, self._dnd, self._work[0].every[number])
        return self._anchors[number][unit]
