"""Preprocessing of images: the geometry (:class:`View`), then the normalisation (:class:`Preprocess`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from milan_ray.errors import UnreadableImage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_ASPECT = 64
"""Largest aspect ratio of an image that is resized by its shorter side: 1 × 100,000 pixels would need 20 GB."""


@dataclass(frozen=True)
class View:
    """A geometry: resize, then centre crop. Hashable, and yields 8-bit RGB.

    Attributes:
        resize: Length of the shorter side in pixels, or (height, width) to squash to, or None to leave the size.
        crop: Side of the centred square crop in pixels, or (height, width), or None for no crop.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``, with antialiasing, as torchvision on PIL images does.
        size: (height, width) of the result; given by ``crop`` or a squashing ``resize`` when left out.
        floor: Whether a crop that cannot be centred begins on the upper or left pixel, as in transformers; else it
            begins on the even one, as in torchvision.
    """

    resize: int | tuple[int, int] | None = 256
    crop: int | tuple[int, int] | None = 224
    interpolation: str = "bilinear"
    size: tuple[int, int] | None = None
    floor: bool = False

    def __post_init__(self) -> None:
        size = self.size
        if size is None and self.crop is not None:
            size = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if size is None and isinstance(self.resize, tuple):
            size = self.resize
        if size is None:
            raise ValueError("a View without a crop or a squashing resize needs an explicit size=(height, width)")
        object.__setattr__(self, "size", size)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the result, pixels."""
        assert self.size is not None  # settled in __post_init__
        return self.size

    @property
    def key(self) -> str:
        """A readable name, e.g. ``r256-c224-bilinear-224x224``; the same exactly for the same geometry."""
        resize, crop = (
            "x".join(map(str, side)) if isinstance(side, tuple) else side for side in (self.resize, self.crop)
        )
        height, width = self.shape
        floor = "f" if self.floor and self.crop is not None else ""
        return f"r{resize}-c{crop}{floor}-{self.interpolation}-{height}x{width}".replace("None", "0")

    def offset(self, whole: int, shown: int) -> int:
        """Where a centred crop of ``shown`` pixels begins along a side of ``whole``; negative where it pads."""
        if whole < shown:
            return -((shown - whole) // 2)
        return (whole - shown) // 2 if self.floor else round((whole - shown) / 2)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Applies the view.

        Args:
            image: An RGB image of any size.

        Returns:
            uint8 (H, W, 3), with (H, W) = :attr:`shape`.

        Raises:
            UnreadableImage: The image is too elongated.
            ValueError: The result has another size than the view promises.
        """
        pixels = self._apply(image)
        if pixels.shape != (*self.shape, 3):
            raise ValueError(f"view {self.key} got an image of shape {pixels.shape}, expected {(*self.shape, 3)}")
        return pixels

    def bands(self, planes: Sequence[Image.Image]) -> np.ndarray:
        """Applies the view to an image of any number of bands.

        Each band is resized alone: as an image with alpha, Pillow would weigh colours by it.

        Args:
            planes: The bands as grey images of one size.

        Returns:
            uint8 (H, W, bands), with (H, W) = :attr:`shape`.

        Raises:
            UnreadableImage: The image is too elongated.
            ValueError: The result has another size than the view promises.
        """
        bands = [self._apply(plane) for plane in planes]
        if any(pixels.shape != self.shape for pixels in bands):
            raise ValueError(f"view {self.key} got bands of shape {bands[0].shape}, expected {self.shape}")
        return np.stack(bands, axis=-1)

    def _apply(self, image: Image.Image) -> np.ndarray:
        if isinstance(self.resize, int) and max(image.size) > MAX_ASPECT * min(image.size):
            raise UnreadableImage(f"is {image.width}×{image.height} pixels, more elongated than {MAX_ASPECT}:1")
        if self.resize is not None:
            image = _resized(image, self.resize, self.interpolation)
        if self.crop is not None:
            height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
            left, top = self.offset(image.width, width), self.offset(image.height, height)
            image = image.crop((left, top, left + width, top + height))  # black where the image does not reach
        return np.asarray(image)


# Same results to the bit as torchvision's Resize and CenterCrop on PIL images. Importing torchvision takes a third of
# a worker's start-up time, and 170 MB per worker: only torchvision's own networks should cost that.


def _resized(image: Image.Image, size: int | tuple[int, int], interpolation: str) -> Image.Image:
    """Resizes the shorter side to ``size``, or squashes the image to (height, width)."""
    if isinstance(size, int):
        short, long = sorted(image.size)
        long = int(size * long / short)
        width, height = (size, long) if image.width <= image.height else (long, size)
    else:
        height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


@dataclass(frozen=True)
class Preprocess:
    """A view and the normalisation that follows it.

    Attributes:
        view: The geometry.
        mean: Per-channel mean, in units of [0, 1].
        std: Per-channel standard deviation, in units of [0, 1].
    """

    view: View = View()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """Turns views into model inputs, with the arithmetic of torchvision's ToTensor and Normalize.

        Args:
            views: uint8 (B, H, W, 3).

        Returns:
            float32 (B, 3, H, W).
        """
        pixels = views.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
        mean, std = (_per_channel(values, pixels.device) for values in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def pixels(self, images: torch.Tensor, truncate: bool = False) -> torch.Tensor:
        """Turns normalised images back into bytes, with the reference's arithmetic.

        Args:
            images: float (B, 3, H, W), normalised by ``mean`` and ``std``.
            truncate: Whether to cut decimals off instead of rounding, as the reference does; a byte that went through
                :meth:`__call__` may then come back one lower.

        Returns:
            uint8 (B, H, W, 3).
        """
        factor, offset = (
            _per_channel([v / (1 / 255) for v in values], images.device) for values in (self.std, self.mean)
        )
        scaled = (images.to(torch.float32) * factor + offset).clamp_(0, 255)
        return (scaled if truncate else scaled.round_()).to(torch.uint8).permute(0, 2, 3, 1)

    def truncated(self, views: np.ndarray) -> np.ndarray:
        """Views as the reference stores them: normalised and converted back, with decimals cut off.

        Args:
            views: uint8 (B, H, W, 3).

        Returns:
            uint8 (B, H, W, 3), each value the same or one lower.
        """
        return self.pixels(self(torch.from_numpy(views)), truncate=True).numpy()


GENERATED = Preprocess(View(resize=(224, 224), crop=None, interpolation="nearest"), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Default for generators: images in [−1, 1], shown at the reference's 224 pixels."""


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled where they are used: a copy of three numbers to a GPU would wait for all that the GPU has yet to do.
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])[None]
