"""Captioners that describe an image in one sentence: BLIP in a local folder, or a plug-in's own.

Nothing is downloaded: a model is a folder that ``save_pretrained`` wrote or a hub's client downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from milan_ray.errors import MilanError, explained
from milan_ray.models.folders import LOCAL, check_complete, find_folder, import_transformers
from milan_ray.models.registry import BUILDING
from milan_ray.models.weights import folder_digest

DEFAULT = "blip-image-captioning-base"
"""BLIP base, trained with filtered captions (Li et al., ICML 2022)."""

BATCH_SIZE = 10
"""Images per pass."""

LONGEST, SHORTEST = 32, 5
"""Maximum number of new tokens, and minimum number of tokens, of a caption."""


class ImageCaptioner(Protocol):
    """Captions images."""

    name: str

    def identity(self) -> dict[str, object]:
        """Everything that determines its captions besides the images."""

    def to(self, device: torch.device) -> Any:
        """Moves the captioner to a device and returns it."""

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption per image, uint8 (H, W, 3) each, all of one size."""


_REGISTERED: dict[str, Callable[[], ImageCaptioner]] = {}


def register_image_captioner(name: str, factory: Callable[[], ImageCaptioner]) -> None:
    """Registers a custom captioner; a later registration of the same name replaces it.

    Args:
        name: Name used in place of a folder.
        factory: Builds the captioner, on the CPU.
    """
    _REGISTERED[name] = factory


@dataclass(frozen=True)
class ImageCaptionerRef:
    """Reference to an image captioner, small enough to send to workers.

    Attributes:
        name: A registered name, a folder, or the name of a folder in ``$MILAN_MODELS_DIR``.
    """

    name: str = DEFAULT

    def load(self) -> ImageCaptioner:
        """Builds the captioner, on the CPU.

        Raises:
            MilanError: There is no such captioner, or its files are damaged.
        """
        if self.name in _REGISTERED:
            return _REGISTERED[self.name]()
        return Blip(find_folder(self.name, "the folder of another model with --captioner", f"Salesforce/{DEFAULT}"))


class Blip:
    """A BLIP captioning model in float32, loaded from a folder on first use."""

    def __init__(self, folder: str) -> None:
        """Stores the folder, and checks the type of its model.

        Args:
            folder: A folder with the model's config.json and weights, its tokenizer and its image processor.

        Raises:
            MilanError: transformers is not installed, or the folder holds something else.
        """
        self.name = Path(folder).name
        self._folder, self._device = folder, torch.device("cpu")
        transformers = import_transformers("captions of images come")
        with explained(f"the captioner in {folder} cannot be loaded", "fetch or save it again.", OSError, ValueError):
            kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "blip":
            raise MilanError(f"{folder} is a model of type {kind!r}: give the folder of a BLIP captioner.")

    def identity(self) -> dict[str, object]:
        """Everything that determines its captions besides the images."""
        return {"blip": 1, "files": folder_digest(self._folder), "tokens": (SHORTEST, LONGEST)}

    def to(self, device: torch.device) -> Blip:
        """Moves the captioner to a device and returns it."""
        self._device = device
        return self

    @torch.inference_mode()
    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption per image, uint8 (H, W, 3) each, by greedy decoding.

        Raises:
            MilanError: The model's files are absent, damaged or unfit.
        """
        model, tokenizer, processor = self._loaded
        captions: list[str] = []
        for start in range(0, len(images), BATCH_SIZE):
            some = [np.array(image) for image in images[start : start + BATCH_SIZE]]
            full = some + [some[0]] * (BATCH_SIZE - len(some))  # always a full batch: no caption depends on others
            pixels = processor(images=full, return_tensors="pt")["pixel_values"].to(self._device)
            tokens = model.generate(pixel_values=pixels, max_new_tokens=LONGEST, min_length=SHORTEST, do_sample=False)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            captions += [text.strip() for text in texts[: len(some)]]
        return captions

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        """The model, its tokenizer and its image processor."""
        transformers = import_transformers("captions of images come")
        needs = (
            "it needs config.json, model.safetensors, the tokenizer's files and preprocessor_config.json of a BLIP "
            "model for captions."
        )
        with BUILDING, explained(f"the captioner in {self._folder} cannot be loaded", needs):
            processor = transformers.AutoImageProcessor.from_pretrained(self._folder, **LOCAL)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, **LOCAL)
            model, report = transformers.BlipForConditionalGeneration.from_pretrained(
                self._folder, output_loading_info=True, use_safetensors=True, **LOCAL
            )
        missing = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
        check_complete(missing, self._folder, ": fetch them again")
        return model.float().to(self._device).eval().requires_grad_(False), tokenizer, processor
