"""The exemplars stage without Ray: the same functions on the same pieces of work, in plain loops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages import images as views
from milan_ray.stages.exemplars import Exemplars, masks, merge, stage
from milan_ray.storage import Storage


class PlainStage:
    """Runs the stage in this process.

    Attributes:
        shards: Seconds of each shard in the last run: reading, decoding, forward pass, kernels, writing.
    """

    def __init__(self) -> None:
        self.shards: list[float] = []

    def run(
        self,
        storage: Storage,
        model: ModelRef | Sequence[ModelRef],
        probe: ProbeRef,
        config: ExemplarConfig,
        device: str = "cpu",
    ) -> None:
        """Does the same as :class:`Exemplars`, for one model or several."""
        models = [model] if isinstance(model, ModelRef) else list(model)
        self.shards.clear()
        with (
            patch.object(stage, "run_pool", self._pool),
            patch.object(masks, "run_pool", self._pool),
            patch.object(merge, "run_parallel", _parallel),
            patch.object(views, "run_parallel", _parallel),
        ):
            resources = Resources(cpus_per_actor=torch.get_num_threads(), device=device)
            Exemplars(models, probe, config).run(storage, resources)

    def _pool(
        self,
        worker: Callable[..., Any],
        arguments: dict[str, Any],
        rows: list[Row],
        resources: Resources,
        **_: object,
    ) -> Iterator[Row]:
        built = worker(**arguments)
        for row in rows:
            started = time.perf_counter()
            answer = built(row)
            self.shards.append(time.perf_counter() - started)
            yield {"seconds": self.shards[-1], **answer}


def _parallel(
    function: Callable[[Any], Any], items: Sequence[Any], *_: object, **__: object
) -> Iterator[tuple[int, Any]]:
    return enumerate(map(function, items))
