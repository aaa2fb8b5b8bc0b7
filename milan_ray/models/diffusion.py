"""Text-to-image pipelines of diffusers in local folders, such as Stable Diffusion (extra ``dnd``).

Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan_ray.errors import explained
from milan_ray.models.folders import LOCAL, find_folder, import_optional
from milan_ray.models.generators import register_generator_family
from milan_ray.models.registry import BUILDING
from milan_ray.models.weights import folder_digest

PREFIX = "diffusers/"
"""Prefix of these generators' names: ``diffusers/FOLDER``, or ``diffusers/FOLDER#STEPS``."""

DEFAULT = "stable-diffusion-v1-5"
"""The model that Describe-and-Dissect's README names."""

STEPS = 50
"""Denoising steps."""

BATCH_SIZE = 5
"""Images per pass: as many as 8 GiB of GPU memory hold at 512 × 512 in half precision."""

_INDEX = "model_index.json"
_CLASSIC = "StableDiffusionPipeline"


def find_diffusion(name: str) -> str:
    """Finds the folder of a generator.

    Args:
        name: A folder, or the name of one in ``$MILAN_MODELS_DIR``.

    Returns:
        Its absolute path.

    Raises:
        MilanError: There is no such folder; the message names the missing file, the places searched, the environment
            variable, and how to get the file.
    """
    other = "the folder of another pipeline of diffusers"
    return find_folder(name, other, f"{DEFAULT}/{DEFAULT}", _INDEX, "the pipeline")


class DiffusionGenerator:
    """A text-to-image pipeline, loaded on first use: half precision on GPUs, float32 on CPUs.

    Each image starts from its own noise, which depends on the seed and the image's number. A classic Stable Diffusion
    pipeline uses the DPM-Solver multistep scheduler, all others their own scheduler. Safety checkers, which blacken
    images, are left out: nobody views these images, and black ones would be measured like any other.
    """

    def __init__(self, folder: str, steps: int = STEPS) -> None:
        """Stores the folder, and reads which pipeline it holds.

        Args:
            folder: As returned by :func:`find_diffusion`.
            steps: Denoising steps.

        Raises:
            MilanError: diffusers is not installed, or the folder holds no pipeline of diffusers.
        """
        self.name = Path(folder).name
        self._folder, self._steps, self._device = folder, steps, torch.device("cpu")
        _import_diffusers()
        with explained(f"{Path(folder, _INDEX)} names no pipeline", "save it again."):
            index = json.loads(Path(folder, _INDEX).read_text(encoding="utf-8"))
            self._kind: str = index["_class_name"]
        self._checked = "safety_checker" in index

    def identity(self) -> dict[str, object]:
        """What determines its images besides text, count and seed; omits the precision, which the device decides."""
        return {"diffusers": 1, "files": folder_digest(self._folder), "steps": self._steps}

    def to(self, device: torch.device) -> DiffusionGenerator:
        """Moves the generator to a device and returns it."""
        self._device = device
        if "_pipeline" in vars(self):  # loaded
            self._pipeline.to(device)
        return self

    @torch.inference_mode()
    def generate(self, text: str, count: int, seed: int) -> np.ndarray:
        """Generates images; the same call gives the same images, within floating-point error.

        Args:
            text: The prompt.
            count: Number of images.
            seed: Different seeds give different images.

        Returns:
            uint8 (count, H, W, 3).

        Raises:
            MilanError: The pipeline's files are absent, damaged or unfit.
        """
        drawn: list[np.ndarray] = []
        for start in range(0, count, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, count))
            # On the CPU, so that every device starts from the same noise.
            noise = [torch.Generator("cpu").manual_seed(_noise_seed(seed, number)) for number in numbers]
            images = self._pipeline(
                [text] * len(noise), num_inference_steps=self._steps, generator=noise, output_type="np"
            ).images
            drawn.append(np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8))
        return np.concatenate(drawn)

    @cached_property
    def _pipeline(self) -> Any:
        diffusers = _import_diffusers()
        precision = torch.float32 if self._device.type == "cpu" else torch.float16
        options: dict[str, Any] = {**LOCAL, "use_safetensors": True}
        if self._checked:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if self._only_half():
            options["variant"] = "fp16"
        needs = "it needs a whole pipeline of diffusers, with weights in safetensors."
        with BUILDING, explained(f"the generator in {self._folder} cannot be loaded", needs):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(self._folder, **options)
        if self._kind == _CLASSIC:
            solver = diffusers.DPMSolverMultistepScheduler
            pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device=self._device, dtype=precision)

    def _only_half(self) -> bool:
        names = [path.name for path in Path(self._folder).glob("*/*.safetensors")]
        return bool(names) and all(".fp16." in name for name in names)


def _noise_seed(seed: int, number: int) -> int:
    """The seed of an image's noise: a hash, because consecutive seeds might give similar noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")


def _import_diffusers() -> Any:
    """The package diffusers.

    Raises:
        MilanError: It is not installed.
    """
    return import_optional("diffusers", "images are drawn", "'milan-ray[dnd]'")


def _resolve(name: str) -> DiffusionGenerator:
    """The generator of ``FOLDER``, or of ``FOLDER#STEPS``."""
    folder, _, steps = name.rpartition("#")
    if folder and steps.isdigit() and int(steps):
        return DiffusionGenerator(find_diffusion(folder), int(steps))
    return DiffusionGenerator(find_diffusion(name))


register_generator_family(PREFIX, _resolve)
