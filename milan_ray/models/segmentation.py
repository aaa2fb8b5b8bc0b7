"""Concept maps from a semantic segmentation network in a folder that transformers saved."""

from __future__ import annotations

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

OPTION = "--segmentation"

DEFAULT = "nvidia/segformer-b0-finetuned-ade-512-512"
"""A network with the 150 classes of ADE20K, named in the message (Xie et al., NeurIPS 2021)."""

NOTHING = {"background", "unlabeled", "unlabelled", "void", "ignore"}
"""Names of classes that stand for no concept."""


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
