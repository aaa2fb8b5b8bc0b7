"""A user's plug-in with a few scenes of the world, and their codes."""

from __future__ import annotations

from functools import partial

from milan_ray.probe.registry import register_probe
from milan_ray.world.generator import CodeProbe
from milan_ray.world.probe import WorldProbe


def codes(split: str) -> CodeProbe:
    return CodeProbe(WorldProbe(split, 40))


for split in ("train", "probe"):
    register_probe(f"tiny/{split}", partial(WorldProbe, split, 40))
    register_probe(f"tiny/{split}-codes", partial(codes, split))
