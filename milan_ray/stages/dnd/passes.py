"""What workers of Describe-and-Dissect compute on their device: each function reads its result from a GPU once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from milan_ray.device import to_device
from milan_ray.exemplars.forward import Forward
from milan_ray.models.image_text import Embedder
from milan_ray.stages.embeddings import products


def unit_maps(forward: Forward, views: np.ndarray, layer: str, units: Sequence[int], size: int) -> torch.Tensor:
    """The maps of some units, (N, units, h, w), on the CPU.

    Args:
        forward: The model.
        views: uint8 (N, H, W, 3).
        layer: The units' layer.
        units: The units.
        size: Images per pass.
    """
    parts = (maps[layer] for maps in _passes(forward, views, size))
    wanted = torch.tensor(units)
    return torch.cat([part.index_select(1, to_device(wanted, part.device)) for part in parts]).cpu()


def pooled_values(
    forward: Forward, views: np.ndarray, pool: Callable[[torch.Tensor], torch.Tensor], size: int
) -> dict[str, np.ndarray]:
    """Layer → pooled activations of all of its units, float32 (N, U).

    Args:
        forward: The model.
        views: uint8 (N, H, W, 3).
        pool: Reduces maps (N, U, h, w) to (N, U).
        size: Images per pass.
    """
    parts = [{layer: pool(maps) for layer, maps in of.items()} for of in _passes(forward, views, size)]
    whole = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    return {layer: values.cpu().numpy() for layer, values in whole.items()}


def _passes(forward: Forward, views: np.ndarray, size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(views), size):
        yield forward.maps(views[start : start + size])


def unit_vectors(embedder: Embedder, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Embeddings of images uint8 (N, H, W, 3), of length 1: float32 (N, D).

    Args:
        embedder: The model of images and texts, on its device.
        images: The images.
        device: The device.
    """
    views = to_device(torch.from_numpy(np.ascontiguousarray(images)), device)
    pixels = views.permute(0, 3, 1, 2).float() * (1 / 255)
    with torch.inference_mode():
        vectors = embedder.embed_images(pixels).float()
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()


def fits(embedder: Embedder, vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """How well images fit texts, float32 (N, texts).

    Args:
        embedder: The model of images and texts, on its device.
        vectors: The images' embeddings, float32 (N, D).
        texts: The texts.
    """
    return products(vectors, embedder.embed_texts(texts).float(), len(texts)).cpu().numpy()
