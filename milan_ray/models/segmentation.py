"""Concept maps from a semantic segmentation network: in a folder that transformers saved, or a plug-in's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from milan_ray.device import resolve_device
from milan_ray.errors import MilanError, explained
from milan_ray.models.folders import LOCAL, find_folder, import_transformers
from milan_ray.models.registry import BUILDING
from milan_ray.models.weights import folder_digest
from milan_ray.names import checked_name
from milan_ray.probe.segmented import Segments

OPTION = "--segmentation"

DEFAULT = "nvidia/segformer-b0-finetuned-ade-512-512"
"""A network with the 150 classes of ADE20K, named in the message (Xie et al., NeurIPS 2021)."""

NOTHING = {"background", "unlabeled", "unlabelled", "void", "ignore"}
"""Names of classes that stand for no concept."""

_REGISTERED: dict[str, Callable[[], Segments]] = {}


def register_segmenter(name: str, factory: Callable[[], Segments]) -> None:
    """Registers a custom segmentation network; a later registration of the same name replaces it.

    Args:
        name: Name used in place of a folder.
        factory: Builds the network; called once per process that asks for its identity or its maps.
    """
    checked_name("a segmentation network", name, slashes=True)
    _REGISTERED[name] = factory


def is_registered(name: str) -> bool:
    """Whether a name was registered with :func:`register_segmenter`."""
    return name in _REGISTERED


def find_segmenter(name: str) -> Segments:
    """The segmentation network of a name; it is loaded on first use.

    Args:
        name: A registered name, a folder that transformers saved, or the name of one in ``$MILAN_MODELS_DIR``.

    Raises:
        MilanError: There is no such network, or transformers, which reads folders, is not installed.
    """
    return RegisteredSegmenter(name) if is_registered(name) else Segmenter(name)


class RegisteredSegmenter:
    """A plug-in's segmentation network. Small when pickled: it travels by name, and its maps are checked."""

    def __init__(self, name: str) -> None:
        """Stores the name.

        Args:
            name: A registered name.
        """
        self.name = name

    def __getstate__(self) -> dict[str, object]:
        """The state without the network."""
        return {"name": self.name}

    @cached_property
    def _loaded(self) -> Segments:
        return _REGISTERED[self.name]()

    def identity(self) -> str:
        """The name, and what the plug-in says that determines the maps."""
        return f"{self.name}:{self._loaded.identity()}"

    def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Concept → bool (H, W), at the resolution that the plug-in chooses; only for concepts that occur.

        Args:
            image: RGB.

        Raises:
            MilanError: A map is no bool (H, W).
        """
        maps = self._loaded.maps(image)
        for concept, shown in maps.items():
            if shown.ndim != 2 or shown.dtype != bool:
                raise MilanError(
                    f"the segmentation network {self.name} says where {concept!r} is with {shown.dtype} "
                    f"{shown.shape}: let it return bool (H, W) over the whole image."
                )
        return {concept: shown for concept, shown in maps.items() if shown.any()}


class Segmenter:
    """Assigns a class to each pixel of an image. Small when pickled: the network is loaded on first use."""

    def __init__(self, name: str) -> None:
        """Finds the folder.

        Args:
            name: A folder with config.json, model.safetensors and preprocessor_config.json, or the name of one in
                ``$MILAN_MODELS_DIR``.

        Raises:
            MilanError: There is no such folder, or transformers is not installed.
        """
        import_transformers("segmentations come")
        self.folder = find_folder(name, f"the folder of another model with {OPTION}", DEFAULT)

    def __getstate__(self) -> dict[str, object]:
        """The state without the network."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    @cached_property
    def _digest(self) -> str:
        return folder_digest(self.folder)

    def identity(self) -> str:
        """Everything that determines its maps: the folder's content."""
        return self._digest

    @torch.inference_mode()
    def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Class → bool (H, W), in the image's own pixels; only for classes with at least one.

        Args:
            image: RGB.

        Raises:
            MilanError: The network's files are absent, damaged, or belong to another kind of model.
        """
        model, processor, names, device = self._loaded
        inputs = processor(images=image, return_tensors="pt").to(device)
        sizes = [(image.height, image.width)]
        (labels,) = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=sizes)
        pixels = labels.cpu().numpy()
        return {names[number]: pixels == number for number in np.unique(pixels).tolist() if number in names}

    @cached_property
    def _loaded(self) -> tuple[Any, Any, dict[int, str], torch.device]:
        """The network, its image processor, the names of its classes, and its device."""
        transformers = import_transformers("segmentations come")
        needs = (
            f"{OPTION} takes config.json, model.safetensors and preprocessor_config.json of one for semantic "
            "segmentation."
        )
        with BUILDING, explained(f"the network in {self.folder} cannot be loaded", needs):
            processor = transformers.AutoImageProcessor.from_pretrained(self.folder, **LOCAL)
            model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
                self.folder, use_safetensors=True, **LOCAL
            )
        if not hasattr(processor, "post_process_semantic_segmentation"):
            raise MilanError(f"the image processor in {Path(self.folder).name} makes no segmentations; give another.")
        device = resolve_device("auto")
        names = {int(number): name.lower() for number, name in model.config.id2label.items()}
        names = {number: name for number, name in names.items() if name not in NOTHING}
        return model.float().to(device).eval().requires_grad_(False), processor, names, device
