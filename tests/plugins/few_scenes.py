"""Registers `world/few`: 96 of the world's held-out scenes."""

from functools import partial

from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe

register_probe("world/few", partial(WorldProbe, "heldout", 96))
