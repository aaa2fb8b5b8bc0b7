"""Registers `world/small_probes`: 96 of the world's held-out scenes."""

from functools import partial

from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe

register_probe("world/small_probes", partial(WorldProbe, "heldout", 96))
