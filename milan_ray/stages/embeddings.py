"""Embeddings by a model of images and texts: every image of a probe once, every distinct text once.

manifest ─► shards ─► [actor pool: read, view, embed] ─► [strung together] ─► image_embeddings
texts ─► chunks ─► [driver, or actor pool: embed] ─► text_embeddings
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.device import resolve_device, torch_threads
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import beside_others
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import read_views
from milan_ray.models.image_text import Embedder, ImageTextRequest
from milan_ray.probe.base import ImageRef, LatentProbe, Probe
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import IMAGE_EMBEDDINGS, MANIFEST, TEXT_EMBEDDINGS
from milan_ray.stages.exemplars import store_manifest
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

_IMAGES_SCHEMA = pa.schema([("image_id", pa.int64()), ("embedding", pa.list_(pa.float32()))])
_TEXTS_SCHEMA = pa.schema([("text", pa.string()), ("embedding", pa.list_(pa.float32()))])


def image_embeddings_recipe(embedder: Embedder, probe: str) -> Recipe:
    """What decides a probe's embeddings.

    Args:
        embedder: The model of images and texts.
        probe: Digest of the probe manifest.
    """
    view = None if embedder.view is None else embedder.view.key
    return Recipe.of({**embedder.identity(), "kernel": KERNEL_VERSION, "view": view, "probe": probe})


@beside_others
def run_image_embeddings(
    storage: Storage, probe: references.ProbeRequest, request: ImageTextRequest, resources: Resources
) -> str:
    """Embeds every readable image of a probe, unless that is done.

    Args:
        storage: The run directory.
        probe: The probe images.
        request: The model of images and texts.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        Digest of the probe manifest.

    Raises:
        MilanError: The probe holds a generator's latents, no image could be read, or the model is missing.
    """
    if isinstance(references.probe(probe), LatentProbe):
        raise MilanError(
            "a generator's latents cannot be embedded by a model of images and texts: give a probe of images."
        )
    manifest, digest = store_manifest(storage, probe)
    embedder = references.image_text(request, probe.plugins)
    recipe = image_embeddings_recipe(embedder, digest)
    keys = {"encoder": request.name, "probe": digest}
    total, work = len(manifest), config_hash({"image_embeddings": recipe.hash})
    if not storage.why(IMAGE_EMBEDDINGS, recipe, **keys):
        storage.remove_work(work)
        say(f"image embeddings ({request.name}): up to date")
        return digest
    names = [f"{n:06d}" for n in range(-(-total // SHARD))]
    stored = set(storage.work_names(work))
    rows: list[Row] = [
        {"name": name, "start": n * SHARD, "stop": min((n + 1) * SHARD, total)}
        for n, name in enumerate(names)
        if name not in stored
    ]
    say(f"image embeddings ({request.name}): {total} images, {len(rows)} of {len(names)} shards to do")
    arguments = {
        "storage": storage,
        "work": work,
        "request": request,
        "probe": probe,
        "digest": digest,
        "threads": resources.threads,
        "device": resources.device,
    }
    cost = Cost()
    with Progress("image embeddings", sum(row["stop"] - row["start"] for row in rows), "images") as progress:
        for answer in run_pool(ImageEmbeddingWorker, arguments, rows, resources):
            progress.advance(answer["images"])
            cost.add(answer["seconds"])
    metadata = {"width": str(embedder.width)}
    made = 0

    def pieces() -> Iterator[pa.Table]:
        nonlocal made
        for start in range(0, len(names), GROUP):
            piece = pa.concat_tables(storage.get_work(work, name) for name in names[start : start + GROUP])
            made += len(piece)
            columns: dict[str, object] = {key: [value] * len(piece) for key, value in keys.items()}
            yield IMAGE_EMBEDDINGS.table(columns | {name: piece[name] for name in piece.column_names})
        if not made:
            raise MilanError(f"no image of the probe could be read, so there is nothing for {request.name} to embed.")
        cost.images = made
        record_run(storage, "image_embeddings", recipe.hash, request.name, rows=made, cost=cost)

    storage.write_stream(IMAGE_EMBEDDINGS, pieces(), recipe, metadata, **keys)
    if made < total:
        say(f"image embeddings ({request.name}): {total - made} of {total} images could not be read")
    storage.remove_work(work)
    return digest


class ImageEmbeddingWorker:
    """Embeds the images of one shard."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        request: ImageTextRequest,
        probe: references.ProbeRequest,
        digest: str,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._digest = storage, work, digest
        self._probe = references.probe(probe)
        self._device = resolve_device(device)
        self._embedder: Embedder = references.image_text(request, probe.plugins).to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one shard."""
        columns = ["image_id", "root", "path"]
        part = self._storage.read_rows(MANIFEST, row["start"], row["stop"], columns, probe=self._digest)
        refs = image_refs(part, range(len(part)))
        tables = [_IMAGES_SCHEMA.empty_table()]
        for start in range(0, len(refs), BATCH):
            ids, embedded = embed_refs(self._embedder, self._probe, refs[start : start + BATCH], self._device)
            tables.append(pa.table([pa.array(ids, pa.int64()), lists_of(embedded)], schema=_IMAGES_SCHEMA))
        self._storage.put_work(self._work, row["name"], pa.concat_tables(tables))
        return {"images": len(refs)}


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
    images = torch.from_numpy(batch.views).to(device).permute(0, 3, 1, 2).float() * (1 / 255)
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
    found = []
    for part in storage.stream(IMAGE_EMBEDDINGS, ["image_id", "embedding"], encoder=encoder, probe=probe):
        wanted = np.isin(part["image_id"].to_numpy(), image_ids)
        found.append(rows_of(part["embedding"])[wanted])
    matrix = np.concatenate(found)
    if len(matrix) != len(image_ids):
        raise MilanError(f"{len(image_ids) - len(matrix)} images have no embedding by {encoder}; run the job again.")
    return matrix


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


def _text_recipe(distinct: Sequence[str], embedder: Embedder) -> tuple[Recipe, str, str]:
    """What decides the embeddings of some texts, the texts' hash, and that of the work."""
    key = config_hash({"texts": list(distinct)})
    recipe = Recipe.of({**embedder.text_identity(), "kernel": KERNEL_VERSION, "texts": key})
    return recipe, key, config_hash({"text_embeddings": recipe.hash})


def remove_text_work(storage: Storage, texts: Sequence[str], embedder: Embedder) -> None:
    """Removes what a job has left of embedding texts that nobody needs any more.

    Args:
        storage: The run directory.
        texts: The texts.
        embedder: The model of images and texts.
    """
    storage.remove_work(_text_recipe(sorted(set(texts)), embedder)[2])


def text_embeddings(
    storage: Storage,
    texts: Sequence[str],
    request: ImageTextRequest,
    resources: Resources,
    plugins: tuple[str, ...] = (),
) -> np.ndarray:
    """Embeds texts, each distinct one once and not again while they are stored.

    Args:
        storage: The run directory.
        texts: N texts.
        request: The model of images and texts.
        resources: What of the cluster to use; Ray must be connected where there are more than :data:`FEW_TEXTS`.
        plugins: Modules that register the model.

    Returns:
        float32 (N, D), in the order of the texts.

    Raises:
        MilanError: The model is missing.
    """
    distinct = sorted(set(texts))
    embedder = references.image_text(request, plugins)
    recipe, key, work = _text_recipe(distinct, embedder)
    keys = {"encoder": request.name, "texts": key}
    if storage.why(TEXT_EMBEDDINGS, recipe, **keys):
        _embed_texts(storage, work, distinct, embedder, request, resources, plugins, recipe, keys)
    storage.remove_work(work)
    table = storage.read(TEXT_EMBEDDINGS, ["text", "embedding"], **keys)
    place = {text: row for row, text in enumerate(table["text"].to_pylist())}
    return rows_of(table["embedding"])[[place[text] for text in texts]]


@beside_others
def _embed_texts(
    storage: Storage,
    work: str,
    texts: list[str],
    embedder: Embedder,
    request: ImageTextRequest,
    resources: Resources,
    plugins: tuple[str, ...],
    recipe: Recipe,
    keys: dict[str, str],
) -> None:
    """Embeds distinct texts and makes them public."""
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    if len(texts) <= FEW_TEXTS:
        with torch_threads(resources.threads):
            tables = [_texts_table(embedder, chunk) for chunk in chunks]
    else:
        stored = set(storage.work_names(work))
        names = [f"{n:06d}" for n in range(len(chunks))]
        rows = [{"name": name, "texts": chunk} for name, chunk in zip(names, chunks, strict=True) if name not in stored]
        arguments = {
            "storage": storage,
            "work": work,
            "request": request,
            "plugins": plugins,
            "threads": resources.threads,
            "device": resources.device,
        }
        with Progress("text embeddings", sum(len(row["texts"]) for row in rows), "texts") as progress:
            for answer in run_pool(TextEmbeddingWorker, arguments, rows, resources):
                progress.advance(answer["texts"])
        tables = [storage.get_work(work, name) for name in names]
    made = pa.concat_tables([_TEXTS_SCHEMA.empty_table(), *tables])
    columns: dict[str, object] = {name: [value] * len(made) for name, value in keys.items()}
    table = TEXT_EMBEDDINGS.table(columns | {name: made[name] for name in made.column_names})
    storage.write(TEXT_EMBEDDINGS, table, recipe, **keys)


class TextEmbeddingWorker:
    """Embeds a chunk of texts."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        request: ImageTextRequest,
        plugins: tuple[str, ...],
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work = storage, work
        self._embedder: Embedder = references.image_text(request, plugins).to(resolve_device(device))

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        self._storage.put_work(self._work, row["name"], _texts_table(self._embedder, row["texts"]))
        return {"texts": len(row["texts"])}


def _texts_table(embedder: Embedder, texts: Sequence[str]) -> pa.Table:
    return pa.table(
        [pa.array(texts, pa.string()), lists_of(embedder.embed_texts(texts).cpu().numpy())], schema=_TEXTS_SCHEMA
    )
