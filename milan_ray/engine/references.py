"""References to models and probes, which travel to workers by name; each worker resolves them itself."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.registry import Activations, ModelSpec
from milan_ray.models.resolve import resolve_model
from milan_ray.models.segmentation import find_segmenter
from milan_ray.models.weights import weights_digest
from milan_ray.plugins import load_plugins
from milan_ray.probe.base import LatentProbe, Probe
from milan_ray.probe.registry import resolve_probe
from milan_ray.probe.segmented import SegmentedProbe

Loaded_co = TypeVar("Loaded_co", covariant=True)


class Loadable(Protocol[Loaded_co]):
    """A reference that loads what it refers to: a generator, an image captioner, a model of images and texts."""

    def load(self) -> Loaded_co:
        """Loads it, on the CPU."""
        ...


@dataclass(frozen=True)
class ModelRef:
    """A model as the user asked for it.

    Attributes:
        name: Registered name.
        weights: Path of a weights file, ``random``, or None for the model's own.
        layers: Layers to dissect; empty for the model's defaults.
        plugins: Modules that register what the name needs.
        activations: Which values of a layer count: ``seen``, ``pre`` or ``post``.
        reading: How the user describes the layers' axes.
        features: Files of features that the layers may name, as ``LAYER=PATH``.
    """

    name: str
    weights: str | None = None
    layers: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    activations: Activations = "seen"
    reading: Reading = UNSAID
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeRef:
    """A probe as the user asked for it.

    Attributes:
        sources: A registered name, or one or several roots.
        labels: Path of a labels file for flat folders, or None.
        plugins: Modules that register what the name needs.
        legend: Path of the file that names the numbers in a folder's label maps, or None.
        segmentation: Folder or registered name of the network that makes concept maps, or None for the probe's own.
        image_column: Column of images in tables and archives; None finds it.
        label_column: Column of class labels; None finds it.
    """

    sources: tuple[str, ...]
    labels: str | None = None
    plugins: tuple[str, ...] = ()
    legend: str | None = None
    segmentation: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def model(ref: ModelRef) -> ModelSpec:
    """Resolves a reference to a model.

    Raises:
        MilanError: Unknown name, missing weights, broken plug-in.
    """
    load_plugins(ref.plugins)
    return resolve_model(
        ref.name, ref.weights, ref.layers, activations=ref.activations, reading=ref.reading, features=ref.features
    )


def probe(ref: ProbeRef) -> Probe:
    """Resolves a reference to a probe.

    Raises:
        MilanError: Unknown name, missing folder, broken plug-in.
    """
    load_plugins(ref.plugins)
    images = resolve_probe(ref.sources, ref.labels, ref.legend, ref.image_column, ref.label_column)
    if ref.segmentation is None:
        return images
    if isinstance(images, LatentProbe):
        raise MilanError("a generator's latents cannot be segmented: leave out --segmentation.")
    return SegmentedProbe(images, find_segmenter(ref.segmentation))


def network(spec: ModelSpec, weights: str | None = None) -> nn.Module:
    """Builds a model whose layers are dissected, on the CPU; its file may lack weights that these do not need.

    Args:
        spec: The model.
        weights: Digest that its weights must have: the driver's; None for any.

    Raises:
        MilanError: It cannot be built, or its weights differ.
    """
    model = spec.load(parts=True)
    if weights is not None and weights_digest(model) != weights:
        raise MilanError(
            f"{spec.name} has other weights on {platform.node()} than where the job was started; every node must see "
            "the same file, and random weights need a seed."
        )
    return model


def load(ref: Loadable[Loaded_co], plugins: tuple[str, ...] = ()) -> Loaded_co:
    """Loads the plug-ins that a reference needs, then what it refers to.

    Raises:
        MilanError: It is unknown, missing or damaged, or a plug-in is broken.
    """
    load_plugins(plugins)
    return ref.load()


def check_units(units: Sequence[int], count: int, model: str, layer: str) -> None:
    """Checks that a layer has the units that ``--units`` asks for.

    Raises:
        MilanError: The layer has fewer units.
    """
    if units and max(units) >= count:
        raise MilanError(
            f"{model} {layer} has {count} units, numbered from 0, and --units asks for {max(units)}; "
            "leave that one out, or choose other --layers."
        )
