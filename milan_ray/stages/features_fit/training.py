"""Trains sparse autoencoders on a layer's outputs, which the training's workers compute as they go.

Every epoch takes the images in another order, a chunk of them after the other. The positions of a chunk are mixed and
cut into batches, so that what is in memory is bounded, and nothing of it is ever stored. Autoencoders of several widths
learn from the same batches. A chunk's end is where an interrupted training goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from milan_ray.captioner.fit import WorkerGroup
from milan_ray.config import config_hash
from milan_ray.device import resolve_device, to_device
from milan_ray.engine import references, trainer
from milan_ray.engine.cluster import decoders, on_gpus
from milan_ray.engine.tasks import run_parallel
from milan_ray.engine.trainer import Scaling, train_on_workers
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward, pass_size, read_ahead
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.moments import Moments
from milan_ray.models.features.sae import JUMPRELU, TOPK, SaeConfig, SparseAutoencoder, Sum, alone
from milan_ray.probe.base import ImageRef
from milan_ray.progress import say, watched
from milan_ray.stages.exemplars import ModelWork, Run
from milan_ray.stages.features_fit.config import TOPK as TOPK_METHOD
from milan_ray.stages.features_fit.config import FitConfig
from milan_ray.stages.features_fit.passes import fitted_to, rows_of
from milan_ray.stages.images import read_refs
from milan_ray.stages.training import EPOCH, SAVE_INTERVAL, line_logger, store_state, stored_state
from milan_ray.storage.files import WORK

CHUNK_BYTES = 2**28
"""Bytes of the outputs that are mixed with each other."""

REPORT_EVERY = 16
"""Chunks after which Ray Train gets a checkpoint, besides those at the ends of epochs."""

FEW = 2**33
"""Products of outputs and weights in a training that the driver does itself: workers take longer to start."""

WARM_UP, COOL_DOWN = 0.05, 0.2
"""Shares of a training in which the learning rate rises, and falls."""

State = dict[str, Any]
Report = Callable[[State, Callable[[], State]], None]
"""Called after every chunk, with the state but for the autoencoders, and with what adds them, which takes a while."""


@dataclass(frozen=True)
class SaeTask:
    """A training of autoencoders of several widths.

    Attributes:
        run: The run.
        item: The network and its layer.
        config: How they are trained.
        moments: Moments of the layer's outputs.
        widths: Set → number of features.
    """

    run: Run
    item: ModelWork
    config: FitConfig
    moments: Moments
    widths: Mapping[str, int]

    @property
    def folder(self) -> str:
        """Where its state lies."""
        return f"{WORK}/{self.item.work}/training-{config_hash({'sets': dict(self.widths)})[:8]}"

    @property
    def sae(self) -> SaeConfig:
        """The settings for the positions that there are."""
        return self.config.sae.for_positions(self.moments.positions)

    def autoencoders(self, device: torch.device) -> dict[str, SparseAutoencoder]:
        """Set → autoencoder before the first step."""
        activation = TOPK if self.config.method == TOPK_METHOD else JUMPRELU
        return {
            name: SparseAutoencoder(self.moments, width, activation, self.config.k, self.sae, self.config.seed, device)
            for name, width in self.widths.items()
        }


def train(task: SaeTask) -> dict[str, Dictionary]:
    """Trains autoencoders, from where an interrupted training of them ended.

    On one worker without a GPU it is a plain task, which gives the same weights as Ray Train and starts sooner.

    Raises:
        MilanError: A worker failed, or the workers do not fit the cluster.
    """
    run, storage = task.run, task.run.storage
    workers = task.config.workers
    products = task.moments.positions * task.config.passes * len(task.moments.mean) * sum(task.widths.values())
    say(
        f"training {', '.join(task.widths)} on {task.moments.positions} positions, {task.config.passes} times"
        + (f", on {workers} workers" if workers > 1 else "")
    )
    epoch = f"{task.folder}/{EPOCH}"
    with watched(line_logger(storage, lambda: [epoch] if storage.exists(epoch) else [])):
        if plain(task):
            small = products <= FEW
            (found,) = run_parallel(_train_in_task, [task], run.resources.cpus_per_actor, in_driver=small)
            state = found[1]
        else:
            gpus = (run.resources.gpus_per_actor or 1) if on_gpus(run.resources) else 0
            scaling = Scaling(workers, run.resources.cpus_per_actor, gpus)
            scaling.capacity()
            arguments = {"task": task}
            state = train_on_workers(_train_worker, arguments, scaling, "features", storage.uri(task.folder))
    found_sets = task.autoencoders(torch.device("cpu"))
    for name, autoencoder in found_sets.items():
        autoencoder.restore(state["sets"][name])
    dictionaries = {name: autoencoder.dictionary() for name, autoencoder in found_sets.items()}
    for name, dictionary in dictionaries.items():
        if not all(bool(tensor.isfinite().all()) for tensor in dictionary.buffers()):
            raise MilanError(f"the training of {name} diverged: give a smaller --lr.")
    return dictionaries


def plain(task: SaeTask) -> bool:
    """Whether a plain task trains, instead of Ray Train."""
    return task.config.workers == 1 and not on_gpus(task.run.resources)


def _train_in_task(task: SaeTask) -> State:
    """Trains in this process; the state is stored every few seconds, so that a task that is run again goes on."""
    storage, path = task.run.storage, f"{task.folder}/state.pt"
    torch.set_num_threads(task.run.resources.threads)
    saved = time.monotonic()

    def report(state: State, whole: Callable[[], State]) -> None:
        nonlocal saved
        if state["chunk"] == 0:
            storage.put(f"{task.folder}/{EPOCH}", epoch_line(state, task).encode())
        if time.monotonic() - saved >= SAVE_INTERVAL:
            store_state(storage, path, whole())
            saved = time.monotonic()

    return fit(task, stored_state(storage, path), report, WorkerGroup(resolve_device(task.run.resources.device)))


def _train_worker(arguments: dict[str, Any]) -> None:
    """Trains inside a worker of Ray Train."""
    task: SaeTask = arguments["task"]
    torch.set_num_threads(task.run.resources.threads)
    group = trainer.RayWorkerGroup()

    def report(state: State, whole: Callable[[], State]) -> None:
        if group.rank == 0 and state["chunk"] == 0:
            task.run.storage.put(f"{task.folder}/{EPOCH}", epoch_line(state, task).encode())
        if state["chunk"] % REPORT_EVERY == 0:
            trainer.report({"epoch": state["epoch"]}, whole() if group.rank == 0 else None)

    total: Sum = torch.distributed.all_reduce if group.workers > 1 else alone  # type: ignore[assignment]
    fit(task, trainer.reported_state(), report, group, total)


def fit(task: SaeTask, state: State | None, report: Report, group: WorkerGroup, total: Sum = alone) -> State:
    """Trains autoencoders from a state to the end.

    Args:
        task: The training.
        state: One that was reported; None for a new training.
        report: Called after every chunk.
        group: The workers.
        total: Sums over them.

    Returns:
        The last state.
    """
    outputs = Outputs(task, group)
    sets = task.autoencoders(group.device)
    state = state or {"sets": {}, "epoch": 0, "chunk": 0, "steps": 0, "history": [], "missed": dict.fromkeys(sets, 0.0)}
    for name, one in state["sets"].items():
        sets[name].restore(one)
    whole = task.config.passes * outputs.chunks
    while state["epoch"] < task.config.passes:
        place = state["epoch"] * outputs.chunks + state["chunk"]
        batches = outputs.batches(state["epoch"], state["chunk"])
        missed = dict.fromkeys(sets, torch.zeros((), device=group.device))
        for number, batch in enumerate(batches):
            rate = pace((place + number / len(batches)) / whole)
            for name, autoencoder in sets.items():
                missed[name] = missed[name] + autoencoder.step(batch, rate, total)
        state = _after(state, outputs.chunks, len(batches), missed)
        report(state, partial(_with_sets, state, sets))
    return _with_sets(state, sets)


def _with_sets(state: State, sets: Mapping[str, SparseAutoencoder]) -> State:
    """A state with the autoencoders."""
    return {**state, "sets": {name: autoencoder.state() for name, autoencoder in sets.items()}}


def _after(state: State, chunks: int, steps: int, missed: Mapping[str, torch.Tensor]) -> State:
    """The state after a chunk, but for the autoencoders themselves."""
    sums = {name: state["missed"][name] + float(value) for name, value in missed.items()}
    after = {**state, "chunk": state["chunk"] + 1, "steps": state["steps"] + steps, "missed": sums}
    if after["chunk"] < chunks:
        return after
    means = {name: value / max(1, after["steps"]) for name, value in sums.items()}
    after |= {"epoch": state["epoch"] + 1, "chunk": 0, "steps": 0, "missed": dict.fromkeys(sums, 0.0)}
    return {**after, "history": [*state["history"], means]}


def pace(done: float) -> float:
    """Factor of the learning rate after a share of a training: it rises at the start and falls at the end."""
    return min(1.0, (done + 1e-3) / WARM_UP, (1 - done) / COOL_DOWN)


def epoch_line(state: State, task: SaeTask) -> str:
    """A line on the last epoch."""
    shares = ", ".join(f"{name} {missed:.3f}" for name, missed in state["history"][-1].items())
    return f"epoch {len(state['history'])} of {task.config.passes}: variance that is not explained: {shares}"


class Outputs:
    """A layer's outputs on the images that features are fitted to, in mixed batches.

    Args:
        task: The training.
        group: The workers, of which each takes its share of every chunk's images.

    Attributes:
        chunks: Chunks of images in an epoch.
    """

    def __init__(self, task: SaeTask, group: WorkerGroup) -> None:
        run, item, config, rows = task.run, task.item, task.config, task.sae.rows
        assert rows is not None
        (self._layer,) = item.layers
        layout = item.described.layouts[self._layer]
        self._run, self._config, self._group, self._rows = run, config, group, rows
        self._spec = references.model(item.model)
        network = references.network(self._spec, item.described.weights).to(group.device)
        self._size = pass_size(self._spec.batch(run.config.batch_size), group.device)
        layouts = {self._layer: layout}
        arithmetic = run.config.arithmetic
        self._forward = Forward(self._spec, network, [self._layer], self._size, arithmetic, layouts)
        self._probe = references.probe(run.probe)
        self._refs = fitted_to(read_refs(run.storage, item.probe, 0, item.plan.images), config.held_out)
        self._width, self._positions = layout.width, math.prod(layout.grid)
        self._chunk = max(group.workers, CHUNK_BYTES // (4 * layout.width * self._positions))
        self.chunks = max(1, -(-len(self._refs) // self._chunk))

    def batches(self, epoch: int, chunk: int) -> list[torch.Tensor]:
        """This worker's part of the batches of a chunk: (N, C), of about equal sizes, mixed.

        Their number depends on the chunk's images alone, also where some cannot be read.

        Args:
            epoch: The epoch, which decides the order of the images.
            chunk: The chunk's number in it.
        """
        order = np.random.default_rng([self._config.seed, epoch]).permutation(len(self._refs))
        chosen = [self._refs[place] for place in order[chunk * self._chunk : (chunk + 1) * self._chunk]]
        count = max(1, round(len(chosen) * self._positions / self._rows))
        rows = self._outputs(chosen[self._group.rank :: self._group.workers])
        generator = torch.Generator().manual_seed(((self._config.seed * 1009 + epoch) * 1_000_003) + chunk)
        mixed = rows[to_device(torch.randperm(len(rows), generator=generator), rows.device)]
        return list(mixed.tensor_split(count))

    @torch.inference_mode()
    def _outputs(self, refs: list[ImageRef]) -> torch.Tensor:
        threads = decoders(self._run.resources.threads, self._group.device)
        found = [
            rows_of(self._forward.maps(batch.inputs)[self._layer])
            for _, batch in read_ahead(self._probe, refs, self._spec, self._size, threads)
            if len(batch.ids)
        ]
        if not found:
            return torch.zeros(0, self._width, device=self._group.device)
        return torch.cat(found)
