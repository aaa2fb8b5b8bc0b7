"""A user's plug-in with a few scenes of the world, and their codes."""

from __future__ import annotations

from milan_ray.probe.registry import register_probe
from milan_ray.world.generator import CodeProbe
from milan_ray.world.probe import WorldProbe

for split in ("train", "probe"):
    register_probe(f"tiny/{split}", lambda split=split: WorldProbe(split, 40))
    register_probe(f"tiny/{split}-codes", lambda split=split: CodeProbe(WorldProbe(split, 40)))
