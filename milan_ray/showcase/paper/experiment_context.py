"""Context of the experiments on the built-in world."""

from __future__ import annotations

from dataclasses import dataclass

from milan_ray.config import Resources
from milan_ray.storage import Storage


@dataclass(frozen=True)
class ExperimentContext:
    """Where and how large.

    Attributes:
        storage: The run directory, as :func:`milan_ray.showcase.paper.prepare` leaves it.
        resources: What of the cluster to use; Ray must be connected.
        small: Sizes of a few seconds per experiment, for tests: the figures then mean nothing.
    """

    storage: Storage
    resources: Resources
    small: bool = False
