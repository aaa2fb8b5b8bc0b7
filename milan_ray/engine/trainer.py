"""Data-parallel training on Ray Train; after a failure it continues from the last epoch."""

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
class Scaling:
    """Number and resources of the workers of one training.

    Attributes:
        workers: Data-parallel workers.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0

    def capacity(self) -> int:
        """The number of such trainings that the cluster can run at a time; starts Ray.

        Raises:
            MilanError: The cluster is too small for one.
        """
        start()
        total = ray.cluster_resources()
        capacity = int(total.get("CPU", 0) / (self.workers * self.cpus))
        if self.gpus:
            capacity = min(capacity, int(total.get("GPU", 0) / (self.workers * self.gpus)))
        if capacity < 1:
            raise MilanError(
                f"{self.workers} training workers of {self.cpus:g} CPUs and {self.gpus:g} GPUs do not fit the cluster "
                f"({total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs); lower --workers or --cpus-per-actor."
            )
        return capacity


def train_on_workers(
    worker: Callable[[dict[str, Any]], None], arguments: Mapping[str, Any], scaling: Scaling, name: str, uri: str
) -> State:
    """Runs ``worker(arguments)`` on every worker; it calls :func:`report` after every epoch.

    Args:
        worker: A picklable function.
        arguments: Its argument.
        scaling: Number and resources of the workers.
        name: Name of the training, for messages.
        uri: Folder for Ray Train's own state; a training whose state is in it continues.

    Returns:
        The state that was reported last.

    Raises:
        MilanError: A worker failed repeatedly, or no worker reported a state.
    """
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=dict(arguments),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus > 0,
            resources_per_worker={"CPU": scaling.cpus, **({"GPU": scaling.gpus} if scaling.gpus else {})},
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


class RayWorkerGroup(WorkerGroup):
    """The workers of a Ray Train run, as seen by one of them."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        super().__init__(ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size())

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this worker's device; its gradients are averaged over the workers."""
        return ray.train.torch.prepare_model(model)

    def mean(self, *metrics: float) -> list[float]:
        """Metrics averaged over the workers."""
        values = torch.tensor(metrics, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return (values / self.workers).tolist()


def reported_state() -> State | None:
    """The state reported last before a failure, None in a new training; called inside a worker."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else _read(checkpoint)


def report(metrics: dict[str, Any], state: State | None) -> None:
    """Reports an epoch; called inside every worker.

    Args:
        metrics: Its metrics, for Ray Train.
        state: The state to continue from after a failure; None on all workers but one.
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
