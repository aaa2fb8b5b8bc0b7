"""A network that says where it runs, and waits or takes memory where it is told to.

For jobs that tests disturb. What happens when is told by variables of the environment, so that no test depends on how
fast a machine is; every process of a job has them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from milan_ray.captioner.encoder import register_encoder
from milan_ray.exemplars import forward
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

WHERE = "MILAN_TEST_WHERE"
"""Environment variable with a file to which every pass, as it begins, adds the node that it runs on."""

PASSES = "MILAN_TEST_PASSES"
"""Environment variable: passes of all processes together that are like any other; 0 when it is not there."""

GATE = "MILAN_TEST_GATE"
"""Environment variable with a file: later passes wait until it is there. Needs `WHERE`."""

READ = "MILAN_TEST_READ"
"""Environment variable with a file to which every batch that is read adds its number of images."""

HUNGER = "MILAN_TEST_HUNGER"
"""Environment variable with a file: the first of the later passes makes it, takes memory, and waits for its process to
be killed for that. Needs `WHERE`."""

PATIENCE = 300
"""Seconds; who waits longer waits in vain."""

PORTION, PORTIONS = 2**26, 96
"""Bytes of memory that are taken at a time, and how often: 6 GiB in all."""


class Slow(nn.Module):
    """Passes that decide results are counted: those of actors, but for each actor's first, which checks the batch."""

    checked = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if where := os.environ.get(WHERE):
            import ray

            # Asking for the context starts a Ray where there is none.
            context = ray.get_runtime_context() if ray.is_initialized() else None
            counted, self.checked = self.checked, context is not None and context.get_actor_id() is not None
            if not counted or context is None:
                return x
            with Path(where).open("a") as log:
                log.write(f"{context.get_node_id()}\n")
            if len(Path(where).read_text().split()) > int(os.environ.get(PASSES, "0")):
                disturb()
        return x


def disturb() -> None:
    """Whatever the environment wants to happen in the middle of a pass."""
    deadline = time.monotonic() + PATIENCE
    if hunger := os.environ.get(HUNGER):
        try:
            Path(hunger).touch(exist_ok=False)
        except FileExistsError:
            return
        taken: list[torch.Tensor] = []
        while time.monotonic() < deadline:
            if len(taken) < PORTIONS:
                taken.append(torch.ones(PORTION, dtype=torch.uint8))
            time.sleep(0.05)
        raise RuntimeError(f"nobody minds {len(taken) * PORTION} bytes")
    if gate := os.environ.get(GATE):
        while not Path(gate).exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody opens {gate}")
            time.sleep(0.05)


def slow_cnn(weights: str | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        Slow(), nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1)
    )


def large_cnn(weights: str | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Slow(), nn.Conv2d(3, 6, 16, stride=16), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))


def slow_encoder(weights: str | None) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))


register_model("slow/cnn", slow_cnn, ("1", "3"), Preprocess(View(resize=24, crop=24)))
register_model("slow/other", slow_cnn, ("3",), Preprocess(View(resize=24, crop=24)))
register_model("slow/large-cnn", large_cnn, ("1", "3"), Preprocess(View(resize=256, crop=224)))
register_model("slow/large-other", large_cnn, ("3",), Preprocess(View(resize=256, crop=224)))
register_encoder("slow", slow_encoder, ("0", "2"), size=24)

if READ in os.environ:
    read = forward._read

    def counted(probe, refs, *arguments):
        with Path(os.environ[READ]).open("a") as log:
            log.write(f"{len(refs)}\n")
        return read(probe, refs, *arguments)

    forward._read = counted
