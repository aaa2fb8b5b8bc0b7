"""Benchmark of encodings: one encoder pass per image, regardless of how many masks, units and models refer to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torchvision
from PIL import Image

from milan_ray.benchmarks.harness import Options, Result, compare, photographs
from milan_ray.captioner.encoder import MASKS, PyramidEncoder, pool_maps
from milan_ray.config import Resources, config_hash
from milan_ray.engine.cluster import connected
from milan_ray.engine.stage import run_stage
from milan_ray.exemplars.masks import pack
from milan_ray.schema import ENCODINGS, EXEMPLARS
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import BATCH_SIZE, Encodings
from milan_ray.stages.images import png
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import block_of, write_block

PER_IMAGE = 20
"""Masks per image, about as many as ResNet-18's 1,024 units give on 800 images."""

K = 15

ZOO = 4
"""Number of models that share the same exemplar images."""

PUBLISHED = 9.98
"""Images per second of the reference with ResNet-101 on two cores of a machine of this kind."""


def random_encoder(name: str, folder: Path) -> EncoderRef:
    """Creates an encoder with random weights, saved to a file that workers can read.

    Args:
        name: A registered torchvision encoder.
        folder: Folder for the weights.
    """
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # otherwise untrained residual sums grow with every block
            module.weight.data.fill_(0.5)
    file = folder / f"{name}.pth"
    torch.save(network.state_dict(), file)
    return EncoderRef(name, str(file))


def run(options: Options) -> Iterator[Result]:
    """Measures pooling, batch sizes, and the stage with one and several models."""
    name, count = ("resnet18", 4) if options.short else ("resnet101", 96)
    with TemporaryDirectory(prefix="milan-encode-") as folder, photographs(options, count) as photos:
        ref = random_encoder(name, Path(folder))
        views = [_view(file) for file in sorted(photos.iterdir())]
        images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
        encoder = ref.load()
        yield _pooling(encoder, images, options)
        yield from _batch_sizes(encoder, images, options)
        yield from _stage(ref, encoder, views, images, Path(folder), options)


def _view(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB").resize((224, 224)))


def _pooling(encoder: PyramidEncoder, images: torch.Tensor, options: Options) -> Result:
    images = images[:BATCH_SIZE]
    index = torch.arange(len(images)).repeat_interleave(PER_IMAGE)
    regions = torch.from_numpy(round_masks(len(index)))
    maps = encoder.maps(images)

    def pool() -> None:
        for some, where in zip(regions.split(MASKS), index.split(MASKS), strict=True):
            pool_maps(maps, some, where)

    name = f"pooling against the encoder pass, {PER_IMAGE} masks per image"
    return compare(name, pool, lambda: encoder.maps(images), options.repeats, work=len(index), unit="masks")


def _passes(encoder: PyramidEncoder, images: torch.Tensor, size: int = BATCH_SIZE) -> None:
    """Runs only the encoder over the images."""
    for batch in images.split(size):
        encoder.maps(batch)


def _batch_sizes(encoder: PyramidEncoder, images: torch.Tensor, options: Options) -> list[Result]:
    """Compares other batch sizes with the pipeline's, over the same images."""
    return [
        compare(
            f"batch of {BATCH_SIZE} against batch of {size}",
            partial(_passes, encoder, images),
            partial(_passes, encoder, images, size),
            options.repeats,
            work=len(images),
            unit="images",
        ).with_facts(the_reference_on_two_cores_images_per_second=PUBLISHED)
        for size in ([4] if options.short else [4, 48])
    ]


def _stage(
    ref: EncoderRef,
    encoder: PyramidEncoder,
    views: list[np.ndarray],
    images: torch.Tensor,
    folder: Path,
    options: Options,
) -> list[Result]:
    """Compares the whole stage, on Ray and with storage, with bare encoder passes over its images."""
    storage = Storage(folder / "run")
    _write_views(storage, views)
    models = [f"benchmark/{number}" for number in range(1 if options.short else ZOO)]
    for number, model in enumerate(models):
        _write_exemplars(storage, model, len(views), number)

    def stage(count: int) -> None:
        storage.remove(ENCODINGS.name)
        run_stage(Encodings({model: ["layer"] for model in models[:count]}, ref), storage, resources)

    resources = Resources(cpus_per_actor=1, actors=options.threads)
    bare = partial(_passes, encoder, images)
    results = []
    with connected(resources):
        for count in sorted({1, len(models)}):
            name = f"stage with {count} models against bare encoder passes over the images"
            compared = compare(
                name, partial(stage, count), bare, options.repeats,
                work=len(views), unit="images", warm_up=not options.short,
            )  # fmt: skip
            results.append(compared.with_facts(masks=float(count * PER_IMAGE * len(views))))
    return results


def _write_views(storage: Storage, views: list[np.ndarray]) -> None:
    for block in sorted({block_of(image_id) for image_id in range(len(views))}):
        ids = [image_id for image_id in range(len(views)) if block_of(image_id) == block]
        pngs = [png(views[image_id]) for image_id in ids]
        write_block(storage, "benchmark", ids, pngs, probe="benchmark", view="benchmark", block=block)


def _write_exemplars(storage: Storage, model: str, images: int, seed: int) -> None:
    """Writes exemplars of enough units that every image has :data:`PER_IMAGE` masks."""
    count = images * PER_IMAGE // K * K
    order = np.random.default_rng(seed).permutation(count) % images
    columns = {
        "model": [model] * count,
        "layer": ["layer"] * count,
        "unit": np.repeat(np.arange(count // K), K),
        "rank": np.tile(np.arange(K), count // K),
        "image_id": order,
        "activation": np.zeros(count, np.float32),
        "mask": pack(torch.from_numpy(round_masks(count))),
    }
    metadata = {"probe": "benchmark", "view": "benchmark", "mask_height": "224", "mask_width": "224"}
    table = EXEMPLARS.table(columns, metadata)
    storage.write(EXEMPLARS, table, config_hash({"benchmark": model}), model=model, layer="layer")


def round_masks(count: int) -> np.ndarray:
    """Generates round regions of about a tenth of the image, bool (count, 224, 224)."""
    centre = np.random.default_rng(0).integers(0, 224, (2, count, 1, 1))
    rows, columns = np.ogrid[:224, :224]
    return (rows[None] - centre[0]) ** 2 + (columns[None] - centre[1]) ** 2 < 40**2
