"""Data-parallel training on Ray Train, which goes on from its last epoch after a failure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

from milan_ray.captioner.fit import State, WorkerGroup
from milan_ray.engine.cluster import start
from milan_ray.errors import MilanError

_STATE = "state.pt"


@dataclass(frozen=True)
class Workers:
    """The workers of one training.

    Attributes:
        count: Data-parallel workers.
        cpus: CPUs of each.
        gpus: GPUs of each.
    """

    count: int = 1
    cpus: float = 1
    gpus: float = 0

    def room(self) -> int:
        """How many such trainings the cluster has room for at a time; starts Ray.

        Raises:
            MilanError: Not one.
        """
        start()
        total = ray.cluster_resources()
        room = int(total.get("CPU", 0) / (self.count * self.cpus))
        if self.gpus:
            room = min(room, int(total.get("GPU", 0) / (self.count * self.gpus)))
        if room < 1:
            raise MilanError(
                f"{self.count} training workers of {self.cpus:g} CPUs and {self.gpus:g} GPUs do not fit the cluster "
                f"({total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs); lower --workers or --cpus-per-actor."
            )
        return room


def train_on_workers(
    worker: Callable[[dict[str, Any]], None], arguments: Mapping[str, Any], workers: Workers, name: str, uri: str
) -> State:
    """Runs ``worker(arguments)`` on every worker; it calls :func:`report` after every epoch.

    Args:
        worker: A picklable function.
        arguments: What it is given.
        workers: How many, of what size.
        name: What is trained, for messages.
        uri: Folder for Ray Train's own state; a training that is there goes on.

    Returns:
        The state that was reported last.

    Raises:
        MilanError: A worker failed, again and again, or reported nothing.
    """
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=dict(arguments),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=uri,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = list(getattr(error, "worker_failures", {}).values())
        why = str(failures[0] if failures else error).strip().splitlines()[-1]
        raise MilanError(f"training of {name} failed ({why}); run it again to go on from its last epoch.") from error
    if result.checkpoint is None:
        raise MilanError(f"training of {name} ended without a checkpoint; run it again with --debug.")
    return _read(result.checkpoint)


class TrainWorkerGroup(WorkerGroup):
    """Inside a worker: it and the others."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        super().__init__(ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size())

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are the mean over the workers."""
        return ray.train.torch.prepare_model(model)

    def mean(self, *metrics: float) -> list[float]:
        """Figures of each worker, averaged over them."""
        values = torch.tensor(metrics, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return (values / self.workers).tolist()


def reported_state() -> State | None:
    """Inside a worker: the state that was reported last before a failure; None at the beginning."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else _read(checkpoint)


def report(metrics: dict[str, Any], state: State | None) -> None:
    """Inside a worker: an epoch is done.

    Args:
        metrics: What Ray Train shows of it.
        state: Where to go on after a failure; None on all workers but one.
    """
    if state is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / _STATE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _read(checkpoint: ray.train.Checkpoint) -> State:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / _STATE, weights_only=True)
