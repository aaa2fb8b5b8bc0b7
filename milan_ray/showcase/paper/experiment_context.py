"""Context of the experiments on the built-in world."""

from __future__ import annotations

from dataclasses import dataclass

from milan_ray.config import Resources
from milan_ray.engine.references import ProbeRef
from milan_ray.storage import Storage

SMALL_PROBES = ("milan_ray.world.small_probes",)
"""Plug-in with the probes of small experiments."""

FEW_SCENES = ProbeRef(("few/heldout",), plugins=SMALL_PROBES)
"""Held-out scenes of small experiments."""


@dataclass(frozen=True)
class ExperimentContext:
    """Run directory, resources and size of the experiments.

    Attributes:
        storage: The run directory after :func:`milan_ray.showcase.paper.prepare`.
        resources: The part of the cluster to use; Ray must be connected.
        small: Use sizes of a few seconds per experiment, for tests. The results are then meaningless.
    """

    storage: Storage
    resources: Resources
    small: bool = False

    def experiment(self, name: str) -> str:
        """Name of an experiment in the tables, which tells small results from others."""
        return f"{name} (small)" if self.small else name
