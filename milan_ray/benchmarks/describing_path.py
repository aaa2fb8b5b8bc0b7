"""One side of ``benchmark versions``: encodes and describes on request, with the package that Python finds.

It runs as a script of its own, so that the same lines measure any version of the package: they use only what all have.
It reads one line for each run, and answers with a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from milan_ray.benchmarks.captioners import Sizes, random_features, trained, untrained
from milan_ray.benchmarks.encode import random_encoder, round_masks
from milan_ray.benchmarks.harness import Options
from milan_ray.captioner.encoder import MaskedExemplars, encode_exemplars
from milan_ray.config import Resources
from milan_ray.engine.actor_pool import run_pool
from milan_ray.exemplars.masks import pack, unpack
from milan_ray.stages.encodings import BATCH_SIZE, encode
from milan_ray.stages.images import png

IMAGES, MASKS_PER_IMAGE, UNITS = 32, 51, 32
"""As 1,024 units on 300 photographs: images of a chunk, masks of each, units of a search."""


class Work:
    """The work of the path's two heavy stages, as their workers do it.

    Args:
        photos: Folder of photographs.
        annotations: Folder of human annotations; empty invents some.
        short: Whether sizes are tiny.
    """

    def __init__(self, photos: str, annotations: str, short: bool) -> None:
        options = Options(short=short, annotations=Path(annotations) if annotations else None)
        sizes = Sizes.of(options)
        self._units = random_features(2 if short else UNITS, sizes.features)
        self._captioners = {"trained": trained(options, sizes), "untrained": untrained(sizes)}
        with TemporaryDirectory() as folder:
            self.encoder = random_encoder(sizes.encoder, Path(folder)).load()
        files = sorted(Path(photos).iterdir())[: 2 if short else IMAGES]
        self._pngs = [png(np.asarray(Image.open(file).convert("RGB").resize((224, 224)))) for file in files]
        self._images = np.repeat(np.arange(len(files)), 2 if short else MASKS_PER_IMAGE)
        self._masks = pa.array(pack(torch.from_numpy(round_masks(len(self._images)))), pa.large_binary())

    def encodings(self) -> str:
        """Encodes the images and pools them with all masks; returns a digest of the features."""
        groups = [MaskedExemplars(self._images, self._masks_at)]
        (features,) = encode_exemplars(self.encoder, groups, self._maps, len(self._pngs), BATCH_SIZE)
        return hashlib.sha256(features.tobytes()).hexdigest()

    def descriptions(self, captioner: str) -> list[list[str]]:
        """Searches candidates of all units and ranks them; returns their texts, best first."""
        own = self._captioners[captioner]
        found = own.candidates(self._units)
        return [
            [texts[place] for place in order] for texts, order in zip(found.texts, found.order(own.lam), strict=True)
        ]

    def _masks_at(self, places: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(unpack(self._masks.take(pa.array(places)).to_pylist(), (224, 224)))

    def _maps(self, start: int, stop: int) -> list[torch.Tensor]:
        return encode(self.encoder, self._pngs[start:stop], BATCH_SIZE)


class Worker:
    """Does a part twice, the second time on the clock, where and as the stages' workers run."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Runs a part by its name; returns processor seconds, seconds and what came out."""
        part = (
            partial(_WORK[0].encodings) if row["part"] == "encodings" else partial(_WORK[0].descriptions, row["part"])
        )
        part()
        cpu, wall = time.process_time(), time.perf_counter()
        result = part()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "result": result}


_WORK: list[Work] = []


def main(photos: str, annotations: str, short: str) -> None:
    """Answers requests until the input ends."""
    _WORK.append(Work(photos, annotations, bool(int(short))))
    print("ready", flush=True)
    for part in map(str.strip, sys.stdin):
        (answer,) = run_pool(Worker, {"threads": 1}, [{"part": part}], Resources(device="cpu"), in_driver=True)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
