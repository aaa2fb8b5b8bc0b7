"""Measures a small run: seconds per image, mask and unit on this machine, and bytes per row of each table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from milan_ray.benchmarks.exemplars import dissect
from milan_ray.benchmarks.harness import Options, elapsed, photographs
from milan_ray.captioner.captioner import Captioner
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.device import resolve_device, torch_threads
from milan_ray.engine import references
from milan_ray.engine.cluster import connected
from milan_ray.engine.costs import LayerShape, ModelCost, Sample, TableSize
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward, pass_size, read_inputs
from milan_ray.exemplars.masks import mask_size, unpack
from milan_ray.exemplars.shard import LayerStates, StateConfig
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import nbytes
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import say
from milan_ray.schema import ENCODINGS, EXEMPLARS, TABLES
from milan_ray.stages.captioners import EncoderRef, load_captioner, save_captioner
from milan_ray.stages.descriptions import Search, labelers, run_descriptions
from milan_ray.stages.encodings import BATCH_SIZE, Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.images import png
from milan_ray.storage import Storage, to_parquet

UNITS_PER_LAYER = 32
"""Maximum number of units described per layer, which is the batch size of a beam search."""

CAPTIONER = "sample"
"""Name of the captioner in the temporary run directory."""


def measure(
    models: Sequence[ModelRef],
    probe: ProbeRef | None,
    config: ExemplarConfig,
    resources: Resources,
    count: int,
    search: Search | None = None,
    encoder: EncoderRef | None = None,
) -> tuple[Sample, int | None, dict[str, str]]:
    """Runs all stages over a few images in a temporary run directory, and measures their cost.

    Times are those of one actor's kernels, without the start of processes; bytes are those of a real run.

    Args:
        models: Models to dissect.
        probe: The probe; None uses noise of 500 × 375 pixels as JPEG.
        config: Configuration of the exemplars.
        resources: Device and threads of an actor.
        count: Number of images, spread evenly over the probe.
        search: Configuration of the search for descriptions; None leaves descriptions out.
        encoder: The captioner's encoder.

    Returns:
        The sample; the number of images in the probe, None without a probe; model → why it could not be measured.

    Raises:
        MilanError: No model can be measured, or the probe cannot be read.
    """
    device = resolve_device(resources.device)
    with TemporaryDirectory(prefix="milan-plan-") as folder, ExitStack() as stack:
        stack.enter_context(torch_threads(resources.threads))
        images, total = stack.enter_context(_images(probe, count, Path(folder, "images")))
        source = ProbeRef((str(images),))
        costs: list[ModelCost] = []
        failed: dict[str, str] = {}
        kept: list[ModelRef] = []
        read, views = 0.0, np.zeros(0, np.uint8)
        for ref in models:
            try:
                spec = references.model(ref)
                seconds, views = _read(source, spec)
                costs.append(_model(ref, spec, views, config, device))
            except Exception as error:  # a user's model may raise anything; the others are still measured
                failed[ref.name] = str(error) or type(error).__name__
                continue
            read = max(read, seconds)
            kept.append(ref)
        if not costs:
            raise MilanError(f"nothing can be measured: {next(iter(failed.values()), 'no model was given')}")
        picture = _per_call(lambda: png(views[0]), len(views))
        storage = Storage(Path(folder, "run"))
        sample = Sample(len(views), device.type, resources.threads, tuple(costs), read, picture)
        with connected(resources):
            done = Exemplars(kept, source, replace(config, shard_size=None)).run(storage, resources)
            failed |= done.failed
            if search is not None and encoder is not None:
                sample = _captioned(storage, done.models, search, encoder, sample, device, resources)
        tables = _tables(storage)
    return replace(sample, tables=tables), total, failed


@contextmanager
def _images(probe: ProbeRef | None, count: int, folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Provides a folder with some images of a probe, and the number of images in the probe."""
    if probe is None:
        with photographs(Options(), count) as noise:
            yield noise, None
        return
    source = references.probe(probe)
    if isinstance(source, LatentProbe):
        raise MilanError("jobs.plan measures models that take images: a generator's latents are not measured.")
    manifest = source.manifest()
    places = np.unique(np.linspace(0, len(manifest) - 1, min(count, len(manifest))).astype(int))
    folder.mkdir()
    for number, ref in enumerate(image_refs(manifest.take(places))):
        file = Path(ref.root, ref.path)
        if file.is_file() and file.suffix:
            os.symlink(file.absolute(), folder / f"{number:06d}{file.suffix}")
        else:  # from a table or object store, or generated: saved as JPEG, like photographs
            source.read(ref).image.save(folder / f"{number:06d}.jpg", quality=90)
    yield folder, len(manifest)


def _read(probe: ProbeRef, spec: ModelSpec) -> tuple[float, np.ndarray]:
    """Measures the seconds to read an image; also returns all views."""
    if spec.images is not None:
        raise MilanError(f"{spec.name} is a generator: measure what its discriminator or a classifier takes.")
    source = references.probe(probe)
    refs = image_refs(source.manifest())
    started = time.perf_counter()
    batch = read_inputs(source, refs, spec)
    seconds = time.perf_counter() - started
    if not len(batch.ids):
        raise MilanError(f"none of {len(refs)} images of the sample can be read: {batch.unreadable[0][1]}.")
    return seconds / len(refs), batch.views


def _model(
    ref: ModelRef, spec: ModelSpec, views: np.ndarray, config: ExemplarConfig, device: torch.device
) -> ModelCost:
    """Measures an actor's cost per image: forward pass, exemplars, levels."""
    network = references.network(spec).to(device)
    size = pass_size(spec.batch(config.batch_size), device)
    forward = Forward(spec, network, spec.layers, size, config.arithmetic)
    plan = StateConfig(len(views), config.k, config.quantile, config.samples, config.map_budget)
    states = LayerStates(plan, torch.get_num_threads())
    forward.maps(views[:size])  # warm-up: the first pass allocates memory and selects algorithms
    seconds = elapsed(partial(dissect, forward, states, views, size))
    passes = -(-len(views) // size) * size  # a short batch is padded, so it takes as long as a full one
    layers = tuple(LayerShape(layer, len(state.topk.ids), *state.map_shape) for layer, state in states.states.items())
    return ModelCost(ref.name, layers, seconds / passes, spec.preprocess.view.key, nbytes(network))


def _per_call(function: Callable[[], object], times: int) -> float:
    return elapsed(lambda: [function() for _ in range(times)]) / times


def _captioned(
    storage: Storage,
    models: dict[str, tuple[str, ...]],
    search: Search,
    encoder: EncoderRef,
    sample: Sample,
    device: torch.device,
    resources: Resources,
) -> Sample:
    """Runs encodings and descriptions of some units, and times their kernels."""
    least = min(layer.units for model in sample.models for layer in model.layers)
    units = tuple(range(min(UNITS_PER_LAYER, least)))
    captioner = load_captioner(encoder.storage, search.decoder)
    save_captioner(storage, CAPTIONER, captioner, "A copy.")
    search = replace(search, decoder=CAPTIONER)
    run_stage(Encodings(models, encoder, units), storage, resources)
    run_descriptions(storage, models, search, resources, units)
    model, layers = next(iter(models.items()))
    captioner = captioner.to(str(device))
    exemplars = storage.read(EXEMPLARS, model=model, layer=layers[0])
    meta = storage.metadata(EXEMPLARS, model=model, layer=layers[0]) or {}
    size = mask_size(meta)
    masks = torch.from_numpy(unpack(exemplars["mask"].to_pylist()[:256], size)).to(device)
    loaded = encoder.load().to(device)
    images = loaded.fit(torch.rand(BATCH_SIZE, 3, *size, device=device))
    maps = loaded.maps(images)  # warm-up, not timed

    index = torch.arange(len(masks), device=device) % BATCH_SIZE
    beam = captioner.beam_size if search.beam_size is None else search.beam_size
    return replace(
        sample,
        encode=_per_call(lambda: loaded.maps(images), 2) / BATCH_SIZE,
        pool=_per_call(lambda: loaded.pool(maps, masks, index), 2) / max(1, len(masks)),
        search=_search(storage, captioner, search, model, layers),
        beam_size=beam,
        labelers=len(labelers(captioner, search)),
    )


def _search(storage: Storage, captioner: Captioner, search: Search, model: str, layers: Sequence[str]) -> float:
    """Measures the seconds of the beam search per unit."""
    features: list[np.ndarray] = []
    for layer in layers:
        table = storage.read(ENCODINGS, encoder=captioner.encoder_name, model=model, layer=layer)
        features += unit_features(table).values()
    most = max(map(len, features))
    batch = np.stack([of_unit for of_unit in features if len(of_unit) == most][:UNITS_PER_LAYER])
    return elapsed(lambda: captioner.candidates(batch, search.beam_size, search.length, search.mi_lam)) / len(batch)


def _tables(storage: Storage) -> dict[str, TableSize]:
    """Measures the bytes of a row and of a file of every table, from the run's output."""
    sizes = {}
    for table in TABLES:
        bytes_ = rows = empty = 0
        files = storage.partitions(table)
        for keys in files:
            bytes_ += storage.stat(table.name)[storage.path(table, **keys)].size
            data = storage.read(table, **keys)
            rows += len(data)
            empty += len(to_parquet(data.slice(0, 0), storage.metadata(table, **keys) or {}))
        if rows:
            fit = TableSize.fit(bytes_, rows, empty)
            sizes[table.name] = TableSize(fit.per_file / len(files), fit.per_row)
    return sizes


def note(failed: dict[str, str]) -> None:
    """Prints which models are not in the estimate."""
    for name, why in failed.items():
        say(f"not measured: {name}: {why}")
