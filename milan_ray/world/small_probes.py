"""Plug-in that registers small probes of the world's scenes, for small versions of experiments."""

from __future__ import annotations

from functools import partial

from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe
from milan_ray.world.training import SPURIOUS_SHARE

SIZE = 48
"""Number of scenes in each probe."""

register_probe("few/heldout", partial(WorldProbe, "heldout", SIZE))
for kind in ("text", "colour"):
    like = partial(WorldProbe, spurious=kind, share=SPURIOUS_SHARE)
    register_probe(f"few/spurious-{kind}-validation", partial(like, "probe", SIZE))
    wrong = partial(WorldProbe, "heldout", SIZE, spurious=kind, misleading=True)
    register_probe(f"few/spurious-{kind}-test", wrong)
