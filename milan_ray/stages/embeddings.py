"""Embeddings by a model of images and texts: every image of a probe once, every distinct text once.

manifest ─► shards ─► [actor pool: read, view, embed] ─► [strung together] ─► image_embeddings
texts ─► chunks ─► [driver, or actor pool: embed] ─► text_embeddings
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.device import to_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.stage import (
    Job,
    Known,
    Output,
    Shard,
    ShardedStage,
    Shards,
    ShardWorker,
    Stream,
    piece_schema,
    run_stage,
)
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import read_views
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.probe.base import ImageRef, LatentProbe, Probe
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import say
from milan_ray.schema import IMAGE_EMBEDDINGS, MANIFEST, TEXT_EMBEDDINGS
from milan_ray.stages.exemplars import store_manifest
from milan_ray.stages.images import read_refs
from milan_ray.storage import Storage

KERNEL_VERSION = "embeddings-1"

SHARD = 128
"""Images per shard."""

BATCH = 16
"""Images read and embedded at a time."""

GROUP = 32
"""Shards per row group of the table."""

FEW_TEXTS = 2048
"""Texts that the driver embeds itself: workers take longer to start."""

CHUNK = 1024
"""Texts per piece of an actor's work."""

IMAGES = 1024
"""Images per matrix product."""

_IMAGES_SCHEMA, _TEXTS_SCHEMA = piece_schema(IMAGE_EMBEDDINGS), piece_schema(TEXT_EMBEDDINGS)


class ImageEmbeddingWorker(ShardWorker):
    """Embeds the images of one shard."""

    def __init__(self, ref: ImageTextRef, probe: references.ProbeRef, **context: Any) -> None:
        super().__init__(**context)
        self._probe = references.probe(probe)
        self._embedder: Embedder = references.load(ref, probe.plugins).to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one shard."""
        refs = read_refs(self._storage, self._outputs[0].keys["probe"], row["start"], row["stop"])
        tables = [_IMAGES_SCHEMA.empty_table()]
        for start in range(0, len(refs), BATCH):
            ids, embedded = embed_refs(self._embedder, self._probe, refs[start : start + BATCH], self._device)
            tables.append(pa.table([pa.array(ids, pa.int64()), lists_of(embedded)], schema=_IMAGES_SCHEMA))
        embeddings = pa.concat_tables(tables)
        self._store(row, [(0, embeddings)])
        return {"images": len(embeddings)}


class ImageEmbeddings(ShardedStage):
    """A probe's readable images, embedded once.

    Args:
        ref: The model of images and texts.
        probe: The probe images.
        embedder: The model, loaded; None loads it.

    Attributes:
        embedder: The model, loaded on the CPU.
        digest: Digest of the probe manifest.
        keys: The partition of the embeddings.

    Raises:
        MilanError: The probe holds a generator's latents, or the model is missing.
    """

    worker = ImageEmbeddingWorker
    table, counted = IMAGE_EMBEDDINGS, "images"
    name, label = "image_embeddings", "image embeddings"

    def __init__(self, ref: ImageTextRef, probe: references.ProbeRef, embedder: Embedder | None = None) -> None:
        source = references.probe(probe)
        if isinstance(source, LatentProbe):
            raise MilanError(
                "a generator's latents cannot be embedded by a model of images and texts: give a probe of images."
            )
        self.ref, self.probe, self.digest = ref, probe, probe_digest(source.manifest())
        self.embedder = references.load(ref, probe.plugins) if embedder is None else embedder
        self.keys = {"encoder": ref.name, "probe": self.digest}
        self.title = f"image embeddings ({ref.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The embeddings of the probe."""
        view = None if self.embedder.view is None else self.embedder.view.key
        identity = {**self.embedder.identity(), "kernel": KERNEL_VERSION, "view": view}
        yield Output(self.keys, Fingerprint.of({**identity, "probe": self.digest}), about=self.ref.name)

    def shards(self, job: Job) -> Shards:
        """Images in the order of the manifest; the driver concatenates the shards, because it reads each once."""
        store_manifest(job.storage, self.probe)
        total = job.storage.count(MANIFEST, probe=self.digest)
        spans = [(start, min(start + SHARD, total)) for start in range(0, total, SHARD)]
        shards = [
            Shard(f"{n:06d}", (0,), {"start": start, "stop": stop}, stop - start)
            for n, (start, stop) in enumerate(spans)
        ]
        return Shards(shards, merged_in_driver=True)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The model, and where the images come from."""
        return {"ref": self.ref, "probe": self.probe}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> Stream:
        """All embeddings, by image."""
        return Stream(self._row_groups(storage, output, iter(pieces)), {"width": str(self.embedder.width)})

    def _row_groups(self, storage: Storage, output: Output, pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
        made, total = 0, storage.count(MANIFEST, probe=self.digest)
        while group := list(itertools.islice(pieces, GROUP)):
            piece = pa.concat_tables(group)
            made += len(piece)
            yield IMAGE_EMBEDDINGS.table(output.columns(piece))
        if not made:
            raise MilanError(f"no image of the probe could be read, so there is nothing for {self.ref.name} to embed.")
        if made < total:
            say(f"{self.title}: {total - made} of {total} images could not be read")


def embed_refs(
    embedder: Embedder, probe: Probe, refs: Sequence[ImageRef], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds some probe images; unreadable ones are left out.

    Args:
        embedder: The model of images and texts, on its device.
        probe: Where the images come from.
        refs: Which images.
        device: The device.

    Returns:
        int64 (n,) image ids, and float32 (n, D).
    """
    assert not isinstance(probe, LatentProbe)
    if embedder.view is None:
        ids = np.array([ref.image_id for ref in refs], np.int64)
        return ids, embedder.embed_maps([probe.concept_maps(ref) for ref in refs]).numpy()
    batch = read_views(probe, refs, embedder.view)
    images = to_device(torch.from_numpy(batch.views), device).permute(0, 3, 1, 2).float() * (1 / 255)
    return batch.ids, embedder.embed_images(images).cpu().numpy()


def lists_of(matrix: np.ndarray) -> pa.ListArray:
    """The rows of (N, D) as lists of its own type."""
    offsets = pa.array(np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(matrix).ravel()))


def rows_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of D numbers as (N, D), of the lists' type."""
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), -1 if len(values) else 0)


def padded(rows: np.ndarray, count: int) -> torch.Tensor:
    """Rows (n, …) and zeros beyond them, (count, …): results must not depend on the number of rows."""
    zeros = np.zeros((count, *rows.shape[1:]), rows.dtype)
    zeros[: len(rows)] = rows
    return torch.from_numpy(zeros)


def products(images: np.ndarray, vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Products of images (N, D) and the first ``count`` of some vectors (B, D), on their device: float32 (N, count).

    Blocks of images are padded to one shape, so that a product does not depend on the number of images.
    """
    parts = [torch.zeros(0, count, device=vectors.device)]
    for start in range(0, len(images), IMAGES):
        block = images[start : start + IMAGES]
        product = to_device(padded(block, IMAGES), vectors.device) @ vectors.T
        parts.append(product[: len(block), :count])
    return torch.cat(parts)


def embeddings_of(storage: Storage, encoder: str, probe: str, image_ids: np.ndarray) -> np.ndarray:
    """Some images' embeddings, read a row group at a time.

    Args:
        storage: The run directory.
        encoder: Name of the model of images and texts.
        probe: Digest of the probe manifest.
        image_ids: int64 (n,), ascending, each embedded.

    Returns:
        float32 (n, D).

    Raises:
        MilanError: One is missing.
    """
    parts = storage.stream(IMAGE_EMBEDDINGS, ["image_id", "embedding"], encoder=encoder, probe=probe)
    matrix = np.concatenate(
        [rows_of(part["embedding"])[np.isin(part["image_id"].to_numpy(), image_ids)] for part in parts]
    )
    if len(matrix) != len(image_ids):
        raise MilanError(f"{len(image_ids) - len(matrix)} images have no embedding by {encoder}; run the job again.")
    return matrix


def embedded_ids(storage: Storage, encoder: str, probe: str) -> np.ndarray:
    """The ids of a probe's embedded images, int64 (N,), ascending."""
    return storage.read(IMAGE_EMBEDDINGS, ["image_id"], encoder=encoder, probe=probe)["image_id"].to_numpy()


def image_embeddings(storage: Storage, encoder: str, probe: str) -> tuple[np.ndarray, np.ndarray]:
    """A probe's embeddings.

    Args:
        storage: The run directory.
        encoder: Name of the model of images and texts.
        probe: Digest of the probe manifest.

    Returns:
        int64 (N,) image ids, ascending, and float32 (N, D).

    Raises:
        MilanError: There are none.
    """
    table = storage.read(IMAGE_EMBEDDINGS, ["image_id", "embedding"], encoder=encoder, probe=probe)
    return table["image_id"].to_numpy(), rows_of(table["embedding"])


class TextEmbeddingWorker(ShardWorker):
    """Embeds a chunk of texts."""

    def __init__(self, ref: ImageTextRef, plugins: tuple[str, ...], **context: Any) -> None:
        super().__init__(**context)
        self._embedder: Embedder = references.load(ref, plugins).to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        vectors = self._embedder.embed_texts(row["texts"]).cpu().numpy()
        texts = pa.array(row["texts"], pa.string())
        self._store(row, [(0, pa.table([texts, lists_of(vectors)], schema=_TEXTS_SCHEMA))])
        return {}


class TextEmbeddings(ShardedStage):
    """Distinct texts, embedded once.

    Args:
        texts: The texts, distinct and sorted.
        ref: The model of images and texts.
        embedder: The same, loaded.
        plugins: Modules that register the model.
    """

    worker = TextEmbeddingWorker
    table, counted, recorded = TEXT_EMBEDDINGS, "texts", False
    name, label = "text_embeddings", "text embeddings"

    def __init__(
        self, texts: Sequence[str], ref: ImageTextRef, embedder: Embedder, plugins: tuple[str, ...] = ()
    ) -> None:
        self._texts, self._ref, self._plugins = list(texts), ref, plugins
        key = config_hash({"texts": self._texts})
        self._fingerprint = Fingerprint.of({**embedder.text_identity(), "kernel": KERNEL_VERSION, "texts": key})
        self.keys = {"encoder": ref.name, "texts": key}
        self.title = f"text embeddings ({ref.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The embeddings of the texts."""
        yield Output(self.keys, self._fingerprint, about=self._ref.name)

    def shards(self, job: Job) -> Shards:
        """Texts in their order."""
        starts = range(0, len(self._texts), CHUNK)
        chunks = [self._texts[start : start + CHUNK] for start in starts]
        shards = [Shard(f"{n:06d}", (0,), {"texts": chunk}, len(chunk)) for n, chunk in enumerate(chunks)]
        return Shards(shards, merged_in_driver=True, run_in_driver=len(self._texts) <= FEW_TEXTS)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The model."""
        return {"ref": self._ref, "plugins": self._plugins}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """All embeddings, by text."""
        return TEXT_EMBEDDINGS.table(output.columns(pa.concat_tables([_TEXTS_SCHEMA.empty_table(), *pieces])))


def text_embeddings(
    storage: Storage,
    texts: Sequence[str],
    ref: ImageTextRef,
    resources: Resources,
    plugins: tuple[str, ...] = (),
) -> np.ndarray:
    """Embeds texts, each distinct one once and not again while they are stored.

    Args:
        storage: The run directory.
        texts: N texts.
        ref: The model of images and texts.
        resources: What of the cluster to use; Ray must be connected where there are more than :data:`FEW_TEXTS`.
        plugins: Modules that register the model.

    Returns:
        float32 (N, D), in the order of the texts.

    Raises:
        MilanError: The model is missing.
    """
    stage = TextEmbeddings(sorted(set(texts)), ref, references.load(ref, plugins), plugins)
    run_stage(stage, storage, resources)
    table = storage.read(TEXT_EMBEDDINGS, ["text", "embedding"], **stage.keys)
    place = {text: row for row, text in enumerate(table["text"].to_pylist())}
    return rows_of(table["embedding"])[[place[text] for text in texts]]
