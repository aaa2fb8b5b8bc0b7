"""The image encoder: a pretrained backbone whose maps are pooled with each exemplar's mask.

Only the pooling depends on the mask, so an image is encoded once for any number of masks: :func:`encode_exemplars`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray.device import to_device
from milan_ray.errors import unknown_name
from milan_ray.models.hooks import LayerTap
from milan_ray.models.image_text import ImageText
from milan_ray.models.registry import BUILDING
from milan_ray.models.view import IMAGENET_MEAN, IMAGENET_STD
from milan_ray.models.weights import WeightsFile, load_strictly, read_weights, weights_digest
from milan_ray.names import checked_name

MASKS = 256
"""Masks pooled at a time, 50 MB at 224×224: bounds memory where an image is an exemplar of thousands of units."""


HELD = 2**28
"""Bytes of features that stay on a GPU before the host reads them, for which it waits."""


@dataclass(frozen=True)
class EncoderSpec:
    """A registered encoder.

    Attributes:
        name: Registered name.
        factory: Builds the backbone with its weights on the CPU; takes the path of a weights file, or None where no
            file is published.
        layers: Module paths whose outputs (B, C, h, w) form the pyramid, in feature order.
        size: Side of the square input images, pixels.
        mean: Per-channel mean of its inputs, in units of [0, 1].
        std: Per-channel standard deviation of its inputs, in units of [0, 1].
        weights: Path of a weights file given by the user; None for the published ones, or the factory's own.
        published: The default weights file; None if the factory needs no file.
        architecture: Builds the backbone without weights, for weights that are stored with a captioner; None builds it
            with ``factory``.
    """

    name: str
    factory: Callable[[str | None], nn.Module]
    layers: tuple[str, ...]
    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    weights: str | None = None
    published: WeightsFile | None = None
    architecture: Callable[[], nn.Module] | None = None

    def load(self, state: Mapping[str, Tensor] | None = None, download: bool = False) -> PyramidEncoder:
        """Builds the encoder in eval mode, without gradients.

        Args:
            state: The backbone's weights, if stored with a captioner.
            download: Whether to download the published weights where they are missing.

        Raises:
            MilanError: A weights file is missing, or weights do not fit the backbone.
        """
        if state is None:
            weights = self.weights
            if weights is None and self.published is not None:
                weights = self.published.find(download, "--encoder-weights")
            with BUILDING:
                return PyramidEncoder(self, self.factory(weights))
        with BUILDING:
            backbone = self.architecture() if self.architecture else self.factory(self.weights)
        used = {name: tensor for name, tensor in state.items() if name in backbone.state_dict()}  # without a head
        load_strictly(backbone, used, f"inside the captioner (encoder {self.name!r})")
        return PyramidEncoder(self, backbone)


class PyramidEncoder(nn.Module):
    """Pools maps of several layers of a backbone with masks into one feature vector per exemplar."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, backbone: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 20 % faster on CPUs, and on GPUs with tensor cores

    def identity(self) -> dict[str, object]:
        """The inputs of a feature's fingerprint besides images and masks."""
        return {
            "weights": weights_digest(self.backbone),
            "structure": hashlib.sha256(repr(self.backbone).encode()).hexdigest(),
            "layers": self.spec.layers,
            "size": self.spec.size,
            "mean": self.spec.mean,
            "std": self.spec.std,
        }

    @functools.cached_property
    def feature_size(self) -> int:
        """Size F of a feature: the channels of all layers."""
        images = torch.zeros(1, 3, self.spec.size, self.spec.size, device=self.mean.device)
        return sum(level.shape[1] for level in self.maps(images))

    def fit(self, images: Tensor) -> Tensor:
        """Resizes images (N, 3, H, W) to the encoder's input size."""
        side = self.spec.size
        if images.shape[-2:] == (side, side):
            return images
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)

    @torch.no_grad()
    def maps(self, images: Tensor, normalize: bool = True) -> list[Tensor]:
        """Encodes images, once for all masks.

        Outputs are not copied, so a layer before an in-place ReLU (as in AlexNet) yields the output of the ReLU, as in
        the reference.

        Args:
            images: float (N, 3, H, W) in [0, 1].
            normalize: Whether to apply the spec's mean and standard deviation.

        Returns:
            One (N, C, h, w) per layer.
        """
        with LayerTap(self.backbone, self.spec.layers) as tap:
            images = images.contiguous(memory_format=torch.channels_last)
            return list(tap((images - self.mean) / self.std if normalize else images).values())

    def pool(self, maps: Sequence[Tensor], masks: Tensor, index: Tensor) -> Tensor:
        """Features (M, F) of regions, by :func:`pool_maps`."""
        return pool_maps(maps, masks, index)

    def forward(self, images: Tensor, masks: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Features (N, F) of images (N, 3, H, W) in [0, 1] and masks (N, H, W); without masks, of whole images."""
        if masks is None:
            masks = images.new_ones(len(images), *images.shape[-2:])
        return pool_maps(self.maps(images, normalize), masks, torch.arange(len(images), device=images.device))


Encoder = PyramidEncoder | ImageText
"""What turns images and masks into features: a captioner's encoder, or a model of images and texts."""


def level_weights(masks: Tensor, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Pooling weights (M, h, w) of masks (M, H, W): downsampled bilinearly, then normalised to a sum of 1.

    There is no antialiasing, so a small region can vanish at a coarse level; its weights and its feature are then 0.

    Args:
        masks: Any float or bool; values in [0, 1].
        size: (h, w).
        dtype: Type of the weights.
    """
    weights = _means_of_four(masks, size, dtype)
    if weights is None:
        large = masks.to(dtype).unsqueeze(1)
        weights = F.interpolate(large, size=size, mode="bilinear", align_corners=False).squeeze(1)
    empty = weights.amax(dim=(1, 2), keepdim=True) <= 1e-8
    return weights / weights.sum(dim=(1, 2), keepdim=True).masked_fill(empty, 1)


def _means_of_four(masks: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """Bool masks downsampled bilinearly by an even number, to the same bits in a sixth of the time; else None.

    A position's centre then lies between four pixels, at the same distance from each.
    """
    steps = [large / small for large, small in zip(masks.shape[1:], size, strict=True)]
    if masks.dtype != torch.bool or any(step % 2 for step in steps):
        return None
    above, left = (int(step) // 2 - 1 for step in steps)
    pixels = masks.to(torch.uint8)  # not a view: PIL's masks hold 255 for True
    rows = [pixels[:, start :: int(steps[0])] for start in (above, above + 1)]
    columns = [row[..., start :: int(steps[1])] for row in rows for start in (left, left + 1)]
    return (columns[0] + columns[1] + columns[2] + columns[3]).to(dtype).mul_(0.25)


def pool_maps(maps: Sequence[Tensor], masks: Tensor, index: Tensor, skip: bool | None = None) -> Tensor:
    """Pools pyramids with masks: per level, the weighted sum of the positions that a mask covers.

    Each sum runs over the mask's positions in order, so a result does not depend on the other masks. With a matrix
    product [masks × positions]·[positions × channels] it would: which kernel computes a row, and so the row's last
    bits, depends on its index and on the number of rows.

    Args:
        maps: One (N, C, h, w) per level.
        masks: (M, H, W), any float or bool; values in [0, 1].
        index: The image of each mask, int64 (M,) in [0, N).
        skip: Whether to list only the positions that masks cover; the host then waits for the device, for their
            number. None does so on a CPU only.

    Returns:
        Features (M, F), F the channels of all levels.
    """
    pooled = []
    for level in maps:
        weights = level_weights(masks, (level.shape[2], level.shape[3]), level.dtype).flatten(1)
        table = level.permute(0, 2, 3, 1).flatten(0, 2)
        skipped = masks.device.type == "cpu" if skip is None else skip
        pooled.append((_sums_of_covered if skipped else _sums_of_all)(table, weights, index))
    return torch.cat(pooled, dim=1)


def _sums_of_covered(table: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Sums (M, C) of the rows of a table (N·P, C) by weights (M, P); only positions with a weight are listed."""
    mask, position = weights.nonzero(as_tuple=True)
    starts = torch.searchsorted(mask, torch.arange(len(weights), device=mask.device))
    rows = index[mask] * weights.shape[1] + position
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights[mask, position])


def _sums_of_all(table: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """The same sums from a list of all positions, whose length does not depend on the masks.

    A position without a weight refers to a row of padding, which the sum leaves out without reading it.
    """
    padding = len(table)
    rows = index[:, None] * weights.shape[1] + torch.arange(weights.shape[1], device=weights.device)
    rows = rows.masked_fill(weights == 0, padding)
    table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights, padding_idx=padding)


@dataclass(frozen=True)
class MaskedExemplars:
    """M exemplars whose masks have one size.

    Attributes:
        images: Number of the image that each exemplar shows, int64 (M,); −1 for an exemplar that is missing.
        masks: From m places among the exemplars, int64 (m,), to their masks (m, H, W), float or bool in [0, 1].
    """

    images: np.ndarray
    masks: Callable[[np.ndarray], Tensor]


def encode_exemplars(
    encoder: Encoder,
    groups: Sequence[MaskedExemplars],
    maps: Callable[[int, int], Sequence[Tensor]],
    count: int,
    batch_size: int,
) -> list[np.ndarray]:
    """Encodes every image once and pools it with all masks that refer to it.

    Args:
        encoder: The encoder.
        groups: The exemplars, by size of their masks.
        maps: From (start, stop) to the encoder's maps of the images of these numbers.
        count: Number of images.
        batch_size: Images per encoder pass.

    Returns:
        Per group features, float32 (M, F); 0 where an exemplar is missing.
    """
    features = [np.zeros((len(group.images), encoder.feature_size), np.float32) for group in groups]
    device = encoder.mean.device
    waiting: list[tuple[np.ndarray, np.ndarray, Tensor]] = []

    def read() -> None:
        for of_group, places, pooled in waiting:
            of_group[places] = pooled.cpu().numpy()
        waiting.clear()

    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        batch = maps(start, stop)
        for group, of_group in zip(groups, features, strict=True):
            shown = np.flatnonzero((group.images >= start) & (group.images < stop))
            for first in range(0, len(shown), MASKS):
                places = shown[first : first + MASKS]
                index = to_device(torch.from_numpy(group.images[places] - start), device)
                pooled = encoder.pool(batch, to_device(group.masks(places), device), index)
                waiting.append((of_group, places, pooled))
                if device.type == "cpu" or sum(part.nbytes for *_, part in waiting) > HELD:
                    read()
    read()
    return features


class SpatialEncoder(nn.Module):
    """The reference's other encoder: all positions of one layer's map of the *masked* image."""

    def __init__(self, encoder: PyramidEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Features (N, h·w, C) of the last layer, row-major, for images (N, 3, H, W) in [0, 1] and masks (N, H, W)."""
        images = (images - self.encoder.mean) / self.encoder.std
        if masks is not None:
            images = images * masks.unsqueeze(1)
        return self.encoder.maps(images, normalize=False)[-1].flatten(2).transpose(1, 2)


_ENCODERS: dict[str, EncoderSpec] = {}


def register_encoder(
    name: str, factory: Callable[[str | None], nn.Module], layers: Sequence[str], **options: Any
) -> EncoderSpec:
    """Registers an encoder under a name; a later registration of the same name replaces it.

    Args:
        name: Name on the command line and in tables.
        factory: ``factory(weights_path_or_None) -> nn.Module``.
        layers: Module paths whose outputs form the pyramid.
        **options: Further fields of :class:`EncoderSpec`.
    """
    checked_name("an encoder", name, slashes=True)
    _ENCODERS[name] = EncoderSpec(name, factory, tuple(layers), **options)
    return _ENCODERS[name]


def get_encoder(name: str) -> EncoderSpec:
    """Finds a registered encoder.

    Raises:
        MilanError: The name is unknown; the message suggests the nearest one.
    """
    if name not in _ENCODERS:
        raise unknown_name("encoder", name, _ENCODERS, "A plug-in can add one with register_encoder.")
    return _ENCODERS[name]


def _build(name: str, path: str | None) -> nn.Module:
    """A backbone without the modules after the last layer of the pyramid, whose weights a file may have or lack."""
    from torchvision import models  # not above: its import takes a third of a worker's start

    model, unused = models.get_model(name, weights=None), "classifier" if name == "alexnet" else "fc"
    model.avgpool = nn.Identity()
    setattr(model, unused, nn.Identity())
    if path is not None:
        load_strictly(model, read_weights(path, model, needless=lambda name: name.startswith(f"{unused}.")), path)
    return model


_RESNET = ("conv1", "layer1", "layer2", "layer3", "layer4")
_ALEXNET = ("features.0", "features.3", "features.6", "features.8", "features.10")
_FILES = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
}
"""The first version of torchvision's weights, with which the published captioners were trained."""

for _name, _file in _FILES.items():
    register_encoder(
        _name,
        functools.partial(_build, _name),
        _ALEXNET if _name == "alexnet" else _RESNET,
        published=WeightsFile.at(f"https://download.pytorch.org/models/{_file}"),
        architecture=functools.partial(_build, _name, None),
    )
