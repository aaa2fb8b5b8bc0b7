"""Running a model over probe images: read, view, pad, one forward pass, all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from milan_ray.errors import UnreadableImage
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import View
from milan_ray.probe.base import ImageRef, Probe


@dataclass
class Batch:
    """Probe images as one model sees them.

    Attributes:
        views: uint8 (n, H, W, 3).
        ids: int64 (n,), their image ids.
        sha256: Their digests, n of them.
        unreadable: What could not be read, with the reason.
    """

    views: np.ndarray
    ids: np.ndarray
    sha256: list[str]
    unreadable: list[tuple[ImageRef, str]] = field(default_factory=list)


def read_views(probe: Probe, refs: Sequence[ImageRef], view: View) -> Batch:
    """Reads images and applies a view; unreadable ones are set aside with their reason."""
    batch = Batch(np.zeros((len(refs), *view.shape, 3), np.uint8), np.zeros(len(refs), np.int64), [])
    for ref in refs:
        good = len(batch.sha256)
        try:
            found = probe.read(ref)
            batch.views[good] = view(found.image)
        except UnreadableImage as error:
            batch.unreadable.append((ref, str(error)))
            continue
        batch.ids[good] = ref.image_id
        batch.sha256.append(found.sha256)
    good = len(batch.sha256)
    batch.views, batch.ids = batch.views[:good], batch.ids[:good]
    return batch


class Forward:
    """A model with taps on its layers, run at one fixed batch size.

    The kernels behind a convolution or matrix product may depend on the batch size, and with them the last bits of
    the result. A short batch is therefore padded to the full size: an image's maps then do not depend on which
    images share its batch.

    Args:
        spec: The model.
        model: The model, built, on its device.
        layers: Module paths to read.
        batch_size: Images per forward pass.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, layers: Sequence[str], batch_size: int) -> None:
        self._spec, self._model, self._layers, self._batch_size = spec, model, tuple(layers), batch_size
        parameter = next(iter(model.parameters()), None)
        self._device = parameter.device if parameter is not None else torch.device("cpu")

    @torch.inference_mode()
    def maps(self, views: np.ndarray) -> dict[str, torch.Tensor]:
        """Every layer's activation maps of up to a batch of images.

        Args:
            views: uint8 (n, H, W, 3), n ≤ batch size.

        Returns:
            Layer → (n, U, h, w), on the model's device.

        Raises:
            MilanError: A layer's output cannot be read as maps.
        """
        count = len(views)
        if count < self._batch_size:
            views = np.concatenate([views, np.zeros((self._batch_size - count, *views.shape[1:]), np.uint8)])
        inputs = self._spec.prepare(torch.from_numpy(views).to(self._device))
        with LayerTap(self._model, self._layers) as tap:
            outputs = tap(inputs)
        return {layer: self._spec.unit_maps(layer, output)[:count] for layer, output in outputs.items()}
