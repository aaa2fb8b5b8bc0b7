"""The parts of the benchmark on a GPU (:mod:`milan_ray.benchmarks.gpu`): each measures one question on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from milan_ray.benchmarks.agreement import agreement
from milan_ray.benchmarks.captioners import Sizes, random_features, untrained
from milan_ray.benchmarks.encode import PER_IMAGE, random_encoder, round_masks
from milan_ray.benchmarks.exemplars import dissect
from milan_ray.benchmarks.harness import Options, Result, elapsed, peak_memory
from milan_ray.benchmarks.plain_stage import PlainStage
from milan_ray.captioner.beam import beam_search
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.encoder import MASKS, PyramidEncoder, pool_maps
from milan_ray.config import FLOAT32, Arithmetic, ExemplarConfig, Resources
from milan_ray.device import to_device
from milan_ray.engine import references
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars.forward import Batch, Forward, pass_size, read_ahead
from milan_ray.exemplars.shard import LayerStates, StateConfig
from milan_ray.models.establish import established
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import say
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

BATCH = 128

MODEL = "resnet18/imagenet"

ZOO = (
    "mnasnet0_5", "mnasnet0_75", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1",
)  # fmt: skip
"""Twelve small networks of torchvision."""

ARITHMETICS = (
    ("float32", FLOAT32, False),
    ("TF32", FLOAT32, True),
    ("TF32, channels_last", Arithmetic(channels_last=True), True),
    ("bfloat16", Arithmetic("bfloat16"), True),
    ("bfloat16, channels_last", Arithmetic("bfloat16", True), True),
)
"""Name, the stage's arithmetic, and whether float32 products may be computed in TF32."""

TIES, TF32_TIES = 1e-4, 1e-2
"""Largest difference, relative to a layer's root mean square, that rounding explains in float32 and in TF32."""


def photo_count(options: Options) -> int:
    """Number of photographs that the parts share: as many as the CPU dissects in a 24th of the time, 64 to 512."""
    if options.short:
        return 4
    network, batch = references.model(ModelRef(MODEL, "random")).load(), torch.zeros(16, 3, 224, 224)
    with torch.inference_mode():
        network(batch)
        rate = len(batch) / elapsed(lambda: network(batch))
    return max(64, min(512, int(rate * 60 * options.minutes / 24) // 16 * 16))


@dataclass(frozen=True)
class Bench:
    """What the parts share.

    Attributes:
        options: The benchmark's options.
        device: The device to measure.
        photos: The folder of photographs.
    """

    options: Options
    device: torch.device
    photos: Path

    @property
    def model(self) -> ModelRef:
        """All five layers of an untrained ResNet-18, or only the last in short runs."""
        return ModelRef(MODEL, "random", ("layer4",) if self.options.short else ())

    @property
    def probe(self) -> ProbeRef:
        """The photographs."""
        return ProbeRef((str(self.photos),))

    @property
    def batch(self) -> int:
        """Images per forward pass."""
        return pass_size(2 if self.options.short else BATCH, self.device)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model."""
        return references.model(self.model)

    @cached_property
    def network(self) -> nn.Module:
        """The model's network, on the CPU."""
        return self.spec.load()

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """How its layers are read."""
        return established(self.spec, self.network, self.spec.layers)

    @cached_property
    def views(self) -> np.ndarray:
        """The photographs, decoded: uint8 (N, H, W, 3)."""
        return np.concatenate([batch.views for batch in self.decoded()])

    def decoded(self) -> Iterator[Batch]:
        """Reads and decodes the photographs, with as many threads as an actor has."""
        source = references.probe(self.probe)
        refs = image_refs(source.manifest())
        return (batch for _, batch in read_ahead(source, refs, self.spec, self.batch, self.options.threads))

    def forward(self, arithmetic: Arithmetic) -> Forward:
        """The model with hooks, on the device."""
        network = deepcopy(self.network).to(self.device)
        return Forward(self.spec, network, self.spec.layers, self.batch, arithmetic, self.layouts)

    def bare(self, arithmetic: Arithmetic = FLOAT32) -> Callable[[], None]:
        """Runs only the network over the decoded images, on the device."""
        network = deepcopy(self.network).to(self.device)
        if arithmetic.channels_last:
            network = network.to(memory_format=torch.channels_last)
        low = None if arithmetic.precision == "float32" else getattr(torch, arithmetic.precision)

        @torch.inference_mode()
        def run() -> None:
            for start in range(0, len(self.views), self.batch):
                views = to_device(torch.from_numpy(self.views[start : start + self.batch]), self.device)
                with torch.autocast(self.device.type, low, enabled=low is not None):
                    network(self.spec.prepare(views))

        return run


def timed(
    name: str,
    subject: Callable[[], object],
    baseline: Callable[[], object] | None,
    bench: Bench,
    seconds: float,
    work: float,
    unit: str,
) -> Result:
    """Times a subject and its baseline in turns, as often as the time allows, but no more than ``--repeats``.

    Both run once before, untimed by the result; what that took decides the number of turns. The facts are the peak
    memory of each on a GPU, and of the process on a CPU.
    """
    functions = [subject, *([] if baseline is None else [baseline])]
    took, memory = [], []
    for function in functions:
        _reset_peak(bench.device)
        took.append(elapsed(function))
        memory.append(_peak(bench.device))
    left = seconds - sum(took)
    # The first run pays for compiling and choosing kernels, so a turn is rather shorter.
    turns = max(1, min(bench.options.repeats, int(left / max(sum(took), 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(turns):
        for number in range(len(functions))[:: 1 if turn % 2 == 0 else -1]:
            times[number].append(elapsed(functions[number]))
    facts = dict(zip(("peak memory, MB", "peak memory of the baseline, MB"), memory, strict=False))
    return Result(name, tuple(times[0]), tuple(times[1]) if baseline else (), work, unit, facts)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Peak memory in MB: of the GPU since the last reset, of the process so far on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Sets whether float32 products and convolutions on a GPU may round their factors to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _config(bench: Bench) -> ExemplarConfig:
    return ExemplarConfig(batch_size=bench.batch, shard_size=2 * bench.batch)


def _stored(bench: Bench, folder: str, device: str, models: Sequence[ModelRef] = ()) -> tuple[Storage, float]:
    """Runs the exemplars stage in this process; returns its storage and the seconds of its shards."""
    storage, plain = Storage(folder), PlainStage()
    plain.run(storage, models or [bench.model], bench.probe, _config(bench), device)
    return storage, sum(plain.shards)


def tables(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares the tables of the device with those of the CPU, in float32 and in TF32."""
    with TemporaryDirectory(prefix="milan-gpu-") as folder:
        reference, bare = _stored(bench, f"{folder}/cpu", "cpu")
        layers = bench.spec.layers
        for name, allowed in (("float32", False), ("TF32", True)):
            with tf32(allowed):
                storage, took = _stored(bench, f"{folder}/{name}", str(bench.device))
            found = agreement(reference, storage, MODEL, layers)
            title = f"tables of {bench.device.type} in {name}, against the CPU's"
            facts = found.facts(ties=TF32_TIES if allowed else TIES)
            yield Result(title, (took,), (bare,), len(bench.views), "images", facts)


def forward(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares the kernels on decoded images with the bare forward pass over the same, in each arithmetic."""
    chosen = [row for row in ARITHMETICS if bench.device.type == "cuda" or row[0] != "TF32"]
    for name, arithmetic, allowed in chosen:
        share = seconds / len(chosen)
        with tf32(allowed):
            kernels, bare = partial(_dissect, bench, bench.forward(arithmetic)), bench.bare(arithmetic)
            passes = _passes(bench, bare, share / 8)
            yield timed(
                f"kernels on decoded images, {name}, against the bare forward pass",
                partial(_repeat, kernels, passes),
                partial(_repeat, bare, passes),
                bench,
                share,
                passes * len(bench.views),
                "images",
            )


def _passes(bench: Bench, function: Callable[[], object], seconds: float) -> int:
    """How often a function runs in some seconds, at least once and at most 64 times; once in short runs."""
    if bench.options.short:
        return 1
    function()
    return max(1, min(64, int(seconds / elapsed(function))))


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def _dissect(bench: Bench, model: Forward) -> None:
    plan = StateConfig(len(bench.views), 15, 0.99, 2**20, 2**28)
    dissect(model, LayerStates(plan, bench.options.threads), bench.views, bench.batch)


def stage(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares an actor's shards, reading, decoding and writing included, with the bare forward pass."""

    def shards() -> None:
        with TemporaryDirectory(prefix="milan-gpu-") as folder:
            _stored(bench, folder, str(bench.device))

    count, threads = len(bench.views), bench.options.threads
    name = f"the stage in one process, {threads} decoding threads, against the bare forward pass over decoded images"
    result = timed(name, shards, bench.bare(), bench, seconds, count, "images")
    decoding = elapsed(lambda: [len(batch.ids) for batch in bench.decoded()])
    yield result.with_facts(**{f"decoding alone, {threads} threads, images/s": count / decoding})


def beam(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares the search with all beams at every step with that which leaves some out; and captions with the CPU's."""
    sizes, ends = Sizes.of(bench.options), time.monotonic() + seconds
    captioner = untrained(sizes)
    few = random_features(2, sizes.features)
    expected = captioner.candidates(few).texts
    captioner.to(str(bench.device))
    found = captioner.candidates(few).texts
    same = [a == b for unit in zip(expected, found, strict=True) for a, b in zip(*unit, strict=True)]
    needed = 0.0
    for units in (2,) if bench.options.short else (32, 128):
        if not _fits(f"searches of {units} units", needed, ends):
            return
        features = to_device(random_features(units, sizes.features), bench.device)
        result = timed(
            f"beam search and re-ranking of {units} units, all beams at every step, against leaving some out",
            partial(_search, captioner, features, False),
            partial(_search, captioner, features, True),
            bench,
            seconds / 2,
            units,
            "units",
        )
        yield result.with_facts(candidates_as_on_the_CPU=f"{sum(same)} of {len(same)}")
        needed = 8 * (result.seconds[0] + result.baseline[0])


def _fits(what: str, needed: float, ends: float) -> bool:
    """Whether the seconds until ``ends`` suffice; says so where they do not."""
    left = max(0.0, ends - time.monotonic())
    if needed > left:
        say(f"benchmark gpu leaves out {what}: they take about {needed:.0f} s, and {left:.0f} s are left")
    return needed <= left


def _search(captioner: Captioner, features: Tensor, skip: bool) -> None:
    assert captioner.lm is not None
    beams = beam_search(captioner.decoder, features, captioner.beam_size, captioner.length, skip=skip)
    tokens = beams.tokens.flatten(0, 1)
    captioner.lm.sequence_logp(tokens, torch.full_like(tokens[:, 0], tokens.shape[1]), skip)


def encoder(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares encoding images and pooling them with masks with the encoder's bare passes."""
    sizes, ends = Sizes.of(bench.options), time.monotonic() + seconds
    with TemporaryDirectory(prefix="milan-gpu-") as folder:
        network = random_encoder(sizes.encoder, Path(folder)).load().to(bench.device)
    needed = 0.0
    for size in (2,) if bench.options.short else (16, 64):
        if not _fits(f"batches of {size} images", needed, ends):
            return
        images = torch.rand(size, 3, 224, 224, device=bench.device)
        index = torch.arange(size, device=bench.device).repeat_interleave(PER_IMAGE)
        masks = to_device(torch.from_numpy(round_masks(len(index))), bench.device)
        for skip in (False, True):
            passes = _passes(bench, partial(network.maps, images), seconds / 32)
            listed = "covered" if skip else "all"
            result = timed(
                f"encoding batches of {size}, {PER_IMAGE} masks an image, {listed} positions listed; bare passes",
                partial(_repeat, partial(_encode, network, images, masks, index, skip), passes),
                partial(_repeat, partial(network.maps, images), passes),
                bench,
                seconds / 4,
                passes * size,
                "images",
            )
            yield result
            needed = 16 * (result.seconds[0] + result.baseline[0]) / passes


def _encode(network: PyramidEncoder, images: Tensor, masks: Tensor, index: Tensor, skip: bool) -> None:
    maps = network.maps(images)
    for some, where in zip(masks.split(MASKS), index.split(MASKS), strict=True):
        pool_maps(maps, some, where, skip)


def zoo(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares one job over twelve small networks with a job for each."""
    every = [ModelRef(f"{name}/imagenet", "random") for name in (ZOO[:2] if bench.options.short else ZOO)]

    def dissected(chosen: Sequence[ModelRef]) -> None:
        with TemporaryDirectory(prefix="milan-gpu-") as folder:
            _stored(bench, folder, str(bench.device), chosen)

    first = elapsed(partial(dissected, every[:1]))
    models = every[: max(2, int((seconds - first) / 2 / first))]
    if len(models) < len(every):
        say(f"benchmark gpu takes {len(models)} of {len(every)} networks, so that the zoo ends in time")

    name = f"one job over {len(models)} small networks, against {len(models)} jobs"
    together, apart = partial(dissected, models), partial(_each, dissected, models)
    yield once(name, together, apart, bench, seconds - first, len(models) * len(bench.views), "images")


def _each(function: Callable[[Sequence[ModelRef]], None], models: Sequence[ModelRef]) -> None:
    for model in models:
        function([model])


def once(
    name: str,
    subject: Callable[[], object],
    baseline: Callable[[], object],
    bench: Bench,
    seconds: float,
    work: float,
    unit: str,
) -> Result:
    """Times a subject once, and its baseline if there is time for as long again."""
    _reset_peak(bench.device)
    took = elapsed(subject)
    facts: dict[str, float | str] = {"peak memory, MB": _peak(bench.device)}
    if 2 * took > seconds:
        facts["baseline"] = f"left out: {max(0.0, seconds - took):.0f} s were left"
        return Result(name, (took,), (), work, unit, facts)
    return Result(name, (took,), (elapsed(baseline),), work, unit, facts)


def ray(bench: Bench, seconds: float) -> Iterator[Result]:
    """Compares two actors that share the GPU through Ray with a plain loop, and their tables."""
    on_gpu = bench.device.type == "cuda"
    resources = Resources(actors=2, gpus_per_actor=0.5 if on_gpu else None, device=str(bench.device))
    with TemporaryDirectory(prefix="milan-gpu-") as folder:
        storages = Storage(f"{folder}/ray"), Storage(f"{folder}/plain")

        def through_ray() -> None:
            with connected(resources):
                Exemplars([bench.model], bench.probe, _config(bench)).run(storages[0], resources)

        shared = "half a GPU each" if on_gpu else "a CPU each"
        name = f"the stage by two actors of {shared}, Ray's start included, against a plain loop"
        plain = partial(_stored, bench, storages[1].root, str(bench.device))
        result = once(name, through_ray, plain, bench, seconds, len(bench.views), "images")
        if result.baseline:
            found = agreement(storages[1], storages[0], MODEL, bench.spec.layers)
            result = result.with_facts(**found.facts(ties=TIES))
        yield result
