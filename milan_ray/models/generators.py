"""Text-to-image generators: their interface and registry.

Other modules rely only on the interface, so that a small generator can replace a real one, which is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from milan_ray.errors import unknown_name
from milan_ray.names import checked_name


class Generator(Protocol):
    """Generates images from a text.

    Attributes:
        name: Its name in tables and messages.
    """

    name: str

    def identity(self) -> dict[str, object]:
        """Everything that determines its images besides text, count and seed."""

    def to(self, device: torch.device) -> Any:
        """Moves the generator to a device and returns it."""

    def generate(self, text: str, count: int, seed: int) -> np.ndarray:
        """Generates images; the same call gives the same images.

        Args:
            text: The prompt.
            count: Number of images.
            seed: Different seeds give different images.

        Returns:
            uint8 (count, H, W, 3).
        """


_GENERATORS: dict[str, Callable[[], Generator]] = {}
_FAMILIES: dict[str, Callable[[str], Generator]] = {}


def register_generator(name: str, factory: Callable[[], Generator]) -> None:
    """Registers a generator under a name; a later registration of the same name replaces it.

    Args:
        name: Name used on the command line.
        factory: Builds the generator, on the CPU.
    """
    checked_name("a generator", name, slashes=True)
    _GENERATORS[name] = factory


def register_generator_family(prefix: str, resolve: Callable[[str], Generator]) -> None:
    """Registers all names that begin with a prefix.

    Args:
        prefix: Such as ``diffusers/``.
        resolve: Builds a generator from the rest of its name after the prefix.
    """
    _FAMILIES[prefix] = resolve


@dataclass(frozen=True)
class GeneratorRef:
    """Reference to a generator, small enough to send to workers.

    Attributes:
        name: A registered name, or one of a family.
    """

    name: str

    def load(self) -> Generator:
        """Builds the generator, on the CPU.

        Raises:
            MilanError: No generator has that name; the message names the nearest.
        """
        if self.name in _GENERATORS:
            return _GENERATORS[self.name]()
        for prefix, resolve in _FAMILIES.items():
            if self.name.startswith(prefix):
                return resolve(self.name[len(prefix) :])
        families = [f"{prefix}…" for prefix in _FAMILIES]
        raise unknown_name(
            "generator", self.name, [*_GENERATORS, *families], "A plug-in can add one with register_generator."
        )
