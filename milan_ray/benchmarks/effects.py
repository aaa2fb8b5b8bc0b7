"""Benchmark of effects: all changes of all units of a classifier's last layers, against bare passes of the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from milan_ray.benchmarks.harness import Options, Result
from milan_ray.engine import references
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars.forward import pass_size, read_inputs
from milan_ray.models.establish import established
from milan_ray.models.interventions import CHANGES, Interventions
from milan_ray.models.registry import ModelSpec
from milan_ray.models.tail import Tail
from milan_ray.probe.manifest import image_refs
from milan_ray.scoring.effects import EffectSums
from milan_ray.scoring.layer_effects import LayerEffects
from milan_ray.stages.effects import Effects, chosen_images

MODEL = "mobilenet_v2/imagenet"
LAST = 5
"""Layers: the last ones of the model's own list."""

IMAGES, TARGET = 4, 200
"""Photographs that are measured, and for which the time on two cores is told."""


def run(options: Options) -> Iterator[Result]:
    """Measures processor seconds, layer by layer and of all, with random weights, which units at 0 depend on."""
    layers = references.model(ModelRef(MODEL, "random")).layers[-1 if options.short else -LAST :]
    spec = references.model(ModelRef(MODEL, "random", layers))
    network = spec.load()
    views = torch.from_numpy(_views(spec, 1 if options.short else IMAGES, options.photos))
    units = 8 if options.short else None
    bare: list[float] = []
    seconds: dict[str, list[float]] = {layer: [] for layer in layers}
    widths: dict[str, int] = {}
    for _ in range(options.repeats):
        bare.append(_processor(partial(_bare, spec, network, views)))
        for layer in layers:
            found, widths[layer] = _kernels(spec, network, layer, units)
            seconds[layer].append(_processor(partial(_measure, found, views)))
    for layer in layers:
        yield _result(f"{widths[layer]} units of {layer} of {MODEL}", seconds[layer], bare, len(views), widths[layer])
    every = [sum(times) for times in zip(*seconds.values(), strict=True)]
    total = _result(f"all units of these layers of {MODEL}", every, bare, len(views), sum(widths.values()))
    yield total.with_facts(
        minutes_of_two_cores_for_200_photographs=float(np.median(every)) / len(views) * TARGET / 2 / 60
    )


def _views(spec: ModelSpec, count: int, photos: Path | None) -> np.ndarray:
    """Photographs, or noise where there are none: uint8 (n, H, W, 3)."""
    if photos is None:
        return np.random.default_rng(0).integers(0, 256, (count, *spec.view_shape), dtype=np.uint8)
    source = references.probe(ProbeRef((str(photos),)))
    ids = chosen_images(source.manifest(), count)["image_id"].to_pylist()
    return read_inputs(source, [ref for ref in image_refs(source.manifest()) if ref.image_id in ids], spec).views


def _kernels(spec: ModelSpec, network: nn.Module, layer: str, units: int | None) -> tuple[list[LayerEffects], int]:
    """The layer's kernels, a block of units each, as workers make them; and the number of units."""
    layout = established(spec, network, [layer], positions=False)[layer]
    count = units or layout.width
    starts = range(0, count, Effects.units_per_shard)
    blocks = [range(start, min(count, start + Effects.units_per_shard)) for start in starts]
    return [
        LayerEffects(Tail(spec, network, layer, layout), Interventions(layer, block, layout.width, 2.0))
        for block in blocks
    ], count


def _measure(kernels: list[LayerEffects], views: torch.Tensor) -> None:
    for kernel in kernels:
        sums: EffectSums | None = None
        for number, view in enumerate(views):
            sums = kernel.add(view, number, sums)


@torch.inference_mode()
def _bare(spec: ModelSpec, network: nn.Module, views: torch.Tensor) -> None:
    """The images once through the network, in batches as actors take them."""
    size = pass_size(spec.batch(128), torch.device("cpu"))
    for part in views.repeat(-(-size // len(views)), 1, 1, 1).split(size):
        network(spec.prepare(part))


def _processor(function: Callable[[], object]) -> float:
    """Processor seconds of all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def _result(name: str, seconds: list[float], bare: list[float], images: int, units: int) -> Result:
    repeated = -(-pass_size(128, torch.device("cpu")) // images)
    each = [time / repeated for time in bare]
    result = Result(
        f"{name}, {len(CHANGES)} changes each, against one bare pass of the images (processor seconds)",
        tuple(seconds), tuple(each), images, "images",
    )  # fmt: skip
    return result.with_facts(
        passes_per_image_without_sharing=len(CHANGES) * units,
        share_of_those=result.ratio / (len(CHANGES) * units),
    )
