"""What travels to workers in place of models and probes: names. Each worker resolves them for itself."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.generators import Generator, GeneratorRef
from milan_ray.models.image_captions import ImageCaptioner, ImageCaptionerRef
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.registry import Activations, ModelSpec
from milan_ray.models.resolve import resolve_model
from milan_ray.models.segmentation import Segmenter
from milan_ray.models.weights import weights_digest
from milan_ray.plugins import load_plugins
from milan_ray.probe.base import LatentProbe, Probe
from milan_ray.probe.registry import resolve_probe
from milan_ray.probe.segmented import SegmentedProbe


@dataclass(frozen=True)
class ModelRef:
    """A model as the user asked for it.

    Attributes:
        name: Registered name.
        weights: Path of a weights file, ``random``, or None for the model's own.
        layers: Layers to dissect; empty for the model's defaults.
        plugins: Modules that register what the name needs.
        activations: Which values of a layer count: ``seen``, ``pre`` or ``post``.
        reading: What the user says of the layers' axes.
    """

    name: str
    weights: str | None = None
    layers: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    activations: Activations = "seen"
    reading: Reading = UNSAID


@dataclass(frozen=True)
class ProbeRef:
    """A probe as the user asked for it.

    Attributes:
        sources: A registered name, or one or several roots.
        labels: Path of a labels file for flat folders, or None.
        plugins: Modules that register what the name needs.
        legend: Path of what the numbers in a folder's label maps mean, or None.
        segmentation: Folder of the network that makes concept maps, or None for the probe's own.
        image_column: Where tables and archives hold images; None finds it.
        label_column: Where they hold classes; None finds it.
    """

    sources: tuple[str, ...]
    labels: str | None = None
    plugins: tuple[str, ...] = ()
    legend: str | None = None
    segmentation: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def model(ref: ModelRef) -> ModelSpec:
    """The model of a ref.

    Raises:
        MilanError: Unknown name, missing weights, broken plug-in.
    """
    load_plugins(ref.plugins)
    return resolve_model(ref.name, ref.weights, ref.layers, activations=ref.activations, reading=ref.reading)


def probe(ref: ProbeRef) -> Probe:
    """The probe of a ref.

    Raises:
        MilanError: Unknown name, missing folder, broken plug-in.
    """
    load_plugins(ref.plugins)
    found = resolve_probe(ref.sources, ref.labels, ref.legend, ref.image_column, ref.label_column)
    if ref.segmentation is None:
        return found
    if isinstance(found, LatentProbe):
        raise MilanError("a generator's latents cannot be segmented: leave out --segmentation.")
    return SegmentedProbe(found, Segmenter(ref.segmentation))


def network(spec: ModelSpec, weights: str | None = None) -> nn.Module:
    """Builds a model, on the CPU.

    Args:
        spec: Which.
        weights: The digest that its weights must have, where the job was started with them.

    Raises:
        MilanError: It cannot be built, or its weights differ.
    """
    model = spec.load()
    if weights is not None and weights_digest(model) != weights:
        raise MilanError(
            f"{spec.name} has other weights on {platform.node()} than where the job was started; every node must see "
            "the same file, and random weights need a seed."
        )
    return model


def image_text(ref: ImageTextRef, plugins: tuple[str, ...] = ()) -> Embedder:
    """The model of images and texts of a ref.

    Raises:
        MilanError: It is missing or damaged, or a plug-in is broken.
    """
    load_plugins(plugins)
    return ref.load()


def generator(ref: GeneratorRef, plugins: tuple[str, ...] = ()) -> Generator:
    """The generator of a ref.

    Raises:
        MilanError: There is none of that name, or a plug-in is broken.
    """
    load_plugins(plugins)
    return ref.load()


def image_captioner(ref: ImageCaptionerRef, plugins: tuple[str, ...] = ()) -> ImageCaptioner:
    """The captioner of images of a ref.

    Raises:
        MilanError: It is missing or damaged, or a plug-in is broken.
    """
    load_plugins(plugins)
    return ref.load()


def check_units(units: Sequence[int], count: int, model: str, layer: str) -> None:
    """Sees that a layer has the units that ``--units`` asks for.

    Raises:
        MilanError: It has not.
    """
    if units and max(units) >= count:
        raise MilanError(
            f"{model} {layer} has {count} units, numbered from 0, and --units asks for {max(units)}; "
            "leave that one out, or choose other --layers."
        )
