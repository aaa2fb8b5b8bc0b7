"""From a file's bytes to an RGB image, whatever the file is."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan_ray.errors import UnreadableImage

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Formats that are decoded, whatever the file is called. Pillow knows more, some of which start programs (EPS)."""

MAX_PIXELS = 89_478_485
"""The largest image that is decoded (Pillow's own warning limit; 256 MiB as RGB): beyond lie decompression bombs."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image as torchvision's default loader does, with defined answers where that has none.

    Grayscale, CMYK, palette and alpha go through Pillow's ``convert("RGB")`` (alpha is dropped, not composited); of
    animations the first frame counts; EXIF orientation is ignored. 16-bit grayscale is scaled down to 8 bits, where
    Pillow alone would clip it.

    Args:
        data: The file's content.

    Returns:
        RGB, 8 bits, loaded.

    Raises:
        UnreadableImage: It is empty, truncated, damaged, too large, or no image.
    """
    if not data:
        raise UnreadableImage("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"is {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode == "F":
                raise UnreadableImage("has floating-point pixels, whose range is unknown")
            if image.mode.startswith("I"):
                return _from_16_bits(image)
            return image.convert("RGB")
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise UnreadableImage(f"is no image in a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"is more than {MAX_PIXELS:,} pixels large") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise UnreadableImage(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Mode I has 32 bits, but holds what 16-bit PNG and PGM files contain; larger values saturate.
    pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
