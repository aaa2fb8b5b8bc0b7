"""Benchmark of exemplars: one pass for all layers, compared with a bare forward pass over the same images."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from milan_ray.benchmarks.harness import Options, Result, alone, compare, elapsed, photographs
from milan_ray.benchmarks.plain_stage import PlainStage
from milan_ray.config import FLOAT32, Arithmetic, ExemplarConfig, Resources
from milan_ray.engine import references
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars.forward import Forward, pass_size, read_inputs
from milan_ray.exemplars.shard import LayerState, LayerStates, StateConfig
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.manifest import image_refs
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

REFERENCE = 143.6
"""Seconds of the reference for the whole stage over 300 photographs on two cores."""

BATCH = 128


def resnet18(options: Options) -> ModelRef:
    """Returns the benchmark's model: all five layers of an untrained ResNet-18, or only the last in short runs."""
    return ModelRef("resnet18/imagenet", "random", ("layer4",) if options.short else ())


def run(options: Options) -> Iterator[Result]:
    """Measures kernels, kernels with decoding, the whole stage, memory, and the scaling with each size."""
    count, model = 4 if options.short else 300, resnet18(options)
    with photographs(options, count) as folder:
        probe = ProbeRef((str(folder),))
        views = _views(model, probe)
        plan, small = StateConfig(count, 15, 0.99, 2**20, 2**28), pass_size(BATCH, torch.device("cpu"))
        for batch, arithmetic, note in (
            (BATCH, FLOAT32, ""),
            (small, FLOAT32, ""),
            (BATCH, Arithmetic(channels_last=True), "; the subject with --channels-last"),
        ):
            yield compare(
                f"all layers of decoded images, against the bare forward pass in batches of {batch}{note}",
                partial(_dissect, _forward(model, arithmetic), plan, views),
                partial(_bare, model, views, batch),
                options.repeats,
                work=count,
                unit="images",
                warm_up=not options.short,
            )
        yield _with_decoding(model, probe, count, options)
        yield _cold_start(model, probe, count, options)
        yield from _arithmetics(model, probe, count, options)
        if not options.short:
            yield _memory(model, probe, count)
        yield from _scaling(options)


def _views(model: ModelRef, probe: ProbeRef) -> np.ndarray:
    source = references.probe(probe)
    return read_inputs(source, image_refs(source.manifest()), references.model(model)).views


def _forward(model: ModelRef, arithmetic: Arithmetic) -> Forward:
    spec, network = _network(model)
    # A copy, because channels-last weights are changed in place.
    return Forward(spec, deepcopy(network), spec.layers, pass_size(BATCH, torch.device("cpu")), arithmetic)


def _dissect(forward: Forward, plan: StateConfig, views: np.ndarray) -> None:
    dissect(forward, LayerStates(plan, torch.get_num_threads()), views, pass_size(BATCH, torch.device("cpu")))


def dissect(forward: Forward, layers: LayerStates, views: np.ndarray, size: int) -> None:
    """Processes a shard's decoded images as an actor does, ``size`` at once."""
    for start in range(0, len(views), size):
        ids = np.arange(start, min(start + size, len(views)))
        layers.update(forward.maps(views[ids]), ids)


@cache
def _network(model: ModelRef) -> tuple[ModelSpec, nn.Module]:
    spec = references.model(model)
    return spec, spec.load()


@torch.inference_mode()
def _bare(model: ModelRef, views: np.ndarray, batch: int = BATCH) -> None:
    """Runs only the model over the images."""
    spec, network = _network(model)
    for start in range(0, len(views), batch):
        network(spec.prepare(torch.from_numpy(views[start : start + batch])))


def _with_decoding(model: ModelRef, probe: ProbeRef, count: int, options: Options) -> Result:
    stage, ours, bare = PlainStage(), [], []
    for _ in range(options.repeats):
        with TemporaryDirectory(prefix="milan-exemplars-") as folder:
            stage.run(Storage(folder), model, probe, ExemplarConfig())
        ours.append(sum(stage.shards))
        bare.append(elapsed(lambda: _bare_with_decoding(model, probe)))
    name = "an actor's shards, reading and writing included, against reading, decoding and the bare forward pass"
    return Result(name, tuple(ours), tuple(bare), count, "images")


def _stage(model: ModelRef, probe: ProbeRef, arithmetic: Arithmetic = FLOAT32) -> None:
    resources = Resources()
    with TemporaryDirectory(prefix="milan-exemplars-") as folder, connected(resources):
        Exemplars([model], probe, ExemplarConfig(arithmetic=arithmetic)).run(Storage(folder), resources)


def _cold_start(model: ModelRef, probe: ProbeRef, count: int, options: Options) -> Result:
    name = f"the whole stage from a cold start, {count} photographs, against one bare pass with decoding"
    stage, bare = partial(_stage, model, probe), partial(_bare_with_decoding, model, probe)
    result = compare(name, stage, bare, options.repeats, work=count, unit="images", warm_up=False)
    passes = 2 * len(references.model(model).layers)
    result = result.with_facts(**{f"times as fast as the reference's {passes} passes, bare": passes / result.ratio})
    if options.short:
        return result
    return result.with_facts(**{"times as fast as the reference's 143.6 s (best run)": REFERENCE / min(result.seconds)})


def _arithmetics(model: ModelRef, probe: ProbeRef, count: int, options: Options) -> Iterator[Result]:
    """Compares the whole stage with and without ``--precision`` and ``--channels-last``."""
    plain = partial(_stage, model, probe)
    for flags, arithmetic in (
        ("--channels-last", Arithmetic(channels_last=True)),
        ("--precision bfloat16", Arithmetic("bfloat16")),
        ("--precision bfloat16 --channels-last", Arithmetic("bfloat16", True)),
    ):
        name, subject = f"the whole stage with {flags}, against the same without", partial(plain, arithmetic)
        yield compare(name, subject, plain, options.repeats, work=count, unit="images", warm_up=False)


def _memory(model: ModelRef, probe: ProbeRef, count: int) -> Result:
    seconds, actor = alone(_plain, model, probe)
    bare_seconds, bare = alone(_bare_alone, model, probe)
    return Result("peak memory", (seconds,), (bare_seconds,), count, "images").with_facts(
        actor_MB=actor, bare_forward_pass_in_batches_of_128_MB=bare, difference_MB=actor - bare
    )


def _plain(model: ModelRef, probe: ProbeRef) -> float:
    with TemporaryDirectory(prefix="milan-exemplars-") as folder:
        return elapsed(lambda: PlainStage().run(Storage(folder), model, probe, ExemplarConfig()))


def _bare_alone(model: ModelRef, probe: ProbeRef) -> float:
    return elapsed(lambda: _bare_with_decoding(model, probe))


def _bare_with_decoding(model: ModelRef, probe: ProbeRef) -> None:
    _bare(model, _views(model, probe))


def _scaling(options: Options) -> Iterator[Result]:
    """Measures kernel seconds against images, units and k, on synthetic maps: layer2's sizes, twice and four times."""
    images, units, k = (32, 8, 5) if options.short else (256, 128, 15)
    for i, u, j in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4)):
        name = f"kernels alone: {images * i} images, {units * u} units, k {k * j}"
        kernels = partial(_kernels, images * i, units * u, k * j)
        yield compare(name, kernels, None, options.repeats, work=images * i, unit="images")


def _kernels(images: int, units: int, k: int) -> None:
    state = LayerState.empty(StateConfig(images, k, 0.99, 2**20, 2**28), units, (28, 28))
    maps = torch.randn(16, units, 28, 28, generator=torch.Generator().manual_seed(0))
    for start in range(0, images, 16):
        # Makes each batch different, at the cost of one pass over it.
        state.update(maps + 0.01 * np.sin(start), np.arange(start, start + 16))
