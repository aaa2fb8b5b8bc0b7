"""Decodes probe images from a file's bytes, a PIL image or an array."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan_ray.errors import UnreadableImage
from milan_ray.probe.base import ProbeImage

FORMATS = (
    "JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "DIB", "TGA", "ICO", "ICNS", "CUR",
    "PSD", "QOI", "PCX", "DCX", "DDS", "SGI", "SUN", "XBM", "XPM", "MSP", "PIXAR", "FLI", "IM", "BLP", "FTEX", "GBR",
    "PCD", "XVTHUMB",
)  # fmt: skip
"""Formats that are decoded, whatever the file name's ending.

Pillow's other formats are excluded: some start programs (EPS, WMF), some unpack without a limit (FITS), and some only
identify files.
"""

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".gif", ".apng",
    ".avif", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga",
)  # fmt: skip
"""Endings, in any case, of files that count as images without reading them. Other files are recognized by content."""

IMAGE_FOLDER = EXTENSIONS[:9]
"""The endings that torchvision's ``ImageFolder`` accepts, for probes whose image numbers must match it."""

HEIC = (".heic", ".heif", ".hif")
"""Endings of files that Pillow decodes with the package pillow-heif (extra ``heic``)."""

HEIC_REMEDY = "pip install 'milan-ray[heic]' reads them"

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of a decoded image: Pillow's limit against decompression bombs; 256 MiB as RGB."""

HEAD = 512
"""Number of bytes at the start of a file from which its format is recognized."""

_GREY = ("1", "L")
_PCX_PALETTE = 769  # size of the palette at the end of a PCX file, bytes
_NOT_16_BITS = 14
"""16-bit pixels that use at most this many bits probably come from a camera or scanner with fewer bits."""

_CERTAIN = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "PSD", "QOI", "DDS")
"""Formats with an unambiguous signature in their first bytes."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_loading = threading.Lock()


def heic_is_read() -> bool:
    """Whether HEIC can be decoded because pillow-heif is installed; registers its decoder."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def image_endings() -> tuple[str, ...]:
    """Endings of files that count as images without reading them."""
    return EXTENSIONS + HEIC if heic_is_read() else EXTENSIONS


def looks_like_image(head: bytes) -> bool:
    """Whether the first :data:`HEAD` bytes of a file with an unknown ending are those of a decodable image."""
    if _is_heif(head):
        return heic_is_read()
    Image.init()
    if any(name in Image.OPEN and Image.OPEN[name][1](head) is True for name in _CERTAIN):  # type: ignore[misc]
        return True
    # A text may start with the two letters of BMP or netpbm, so the rest of the header must be valid, too.
    try:
        with Image.open(io.BytesIO(head), formats=("BMP", "PPM")):
            return True
    except Exception:  # Pillow's readers raise almost any exception on files that are not images
        return False


def decode(data: bytes) -> Image.Image:
    """Decodes an image as torchvision's default loader does; see :func:`probe_image`.

    Args:
        data: The file's content.

    Returns:
        An RGB image of 8 bits, loaded.

    Raises:
        UnreadableImage: The file is empty, truncated, damaged, too large, or not an image.
    """
    return probe_image(data, "").image


def probe_image(data: bytes, sha256: str | None = None) -> ProbeImage:
    """Decodes an image as torchvision's default loader does, with defined results where that loader has none.

    Grayscale, CMYK, palette and alpha images are converted by Pillow's ``convert("RGB")``; alpha is dropped, not
    composited. Only the first frame of an animation is used. EXIF orientation is ignored. 16-bit grayscale is scaled
    down to 8 bits; Pillow alone would clip it.

    Args:
        data: The file's content.
        sha256: Hex digest of the content; None computes it.

    Raises:
        UnreadableImage: The file is empty, truncated, damaged, too large, or not an image.
    """
    if not data:
        raise UnreadableImage("is empty (0 bytes)")
    formats: tuple[str, ...] = FORMATS
    if _is_heif(data):
        if not heic_is_read():
            raise UnreadableImage(f"is HEIC: {HEIC_REMEDY}")
        formats = (*FORMATS, "HEIF")
    with _unreadable(), Image.open(io.BytesIO(data), formats=formats) as image:
        return settle(image, hashlib.sha256(data).hexdigest() if sha256 is None else sha256)


@contextmanager
def _unreadable() -> Iterator[None]:
    """Converts everything that Pillow's readers raise on damaged files, which is almost any exception."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise UnreadableImage("is no image in a known format (JPEG, PNG, TIFF, WebP, GIF, AVIF, …)") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"is more than {MAX_PIXELS:,} pixels large") from error
    except Exception as error:
        raise UnreadableImage(f"cannot be decoded ({type(error).__name__}: {error})") from error


@_unreadable()
def settle(image: Image.Image, sha256: str = "") -> ProbeImage:
    """Converts an opened or generated PIL image to the result of :func:`probe_image` for its file.

    Raises:
        UnreadableImage: The image is damaged, too large, or has pixels of unknown range.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"is {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
    if image.mode == "F":
        raise UnreadableImage("has floating-point pixels, whose range is unknown")
    _refuse_doubtful(image)
    inverted = _tag(image, 262) == 0  # TIFF's WhiteIsZero, which Pillow applies only to 8-bit images
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    # A list may contain an opened, unloaded image twice, so two threads may load it at the same time.
    with _loading if getattr(image, "fp", None) is not None else nullcontext():
        image.load()
    if image.mode.startswith("I"):
        return _from_16_bits(image, sha256, inverted)
    if image.mode == "PA":
        image = image.convert("RGBA")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    note = None
    if deep and max(high for _, high in image.convert("RGB").getextrema()) >> (_NOT_16_BITS - 8) == 0:  # type: ignore[misc]
        note = _too_dark(_NOT_16_BITS)
    bands = None
    if image.mode in _GREY:
        bands = image.convert("L")
    elif image.mode in ("LA", "RGBA", "RGBX", "CMYK"):
        bands = image if getattr(image, "fp", None) is None else image.copy()
    return ProbeImage(image.convert("RGB"), sha256, bands, note)


def from_array(pixels: np.ndarray, sha256: str = "") -> ProbeImage:
    """Makes a probe image of an array of pixels.

    Args:
        pixels: uint8 (H, W), (H, W, 3), or (H, W, N) for N bands. The first three bands are displayed as RGB; with two
            bands, the first is displayed as grayscale.
        sha256: Digest of the content.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 3:
        return ProbeImage(Image.fromarray(np.ascontiguousarray(pixels)), sha256)
    shown = pixels[..., :3] if pixels.shape[2] > 3 else np.repeat(pixels[..., :1], 3, axis=2)
    return ProbeImage(Image.fromarray(np.ascontiguousarray(shown)), sha256, pixels)


def _tag(image: Image.Image, number: int) -> object:
    """The value of a TIFF tag; None for other formats."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _refuse_doubtful(image: Image.Image) -> None:
    """Rejects files that Pillow decodes incorrectly.

    Raises:
        UnreadableImage: The image is such a file.
    """
    bits = _tag(image, 258)
    if _tag(image, 339) == 2 and bits != 32:  # Pillow itself writes mode I as signed: _from_16_bits checks its values
        raise UnreadableImage(f"has signed pixels of {bits} bits, whose range is unknown")
    if _tag(image, 262) == 0 and bits == 32:
        raise UnreadableImage("has inverted 32-bit pixels, whose range is unknown")
    if image.format == "DCX" and image.mode in ("L", "P") and getattr(image, "n_frames", 1) > 1:
        raise UnreadableImage("is a DCX file of several palette images, whose palettes cannot be told apart")
    file = getattr(image, "fp", None)
    if image.format in ("PCX", "DCX") and image.mode == "L" and file is not None:
        before = file.tell()
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - _PCX_PALETTE, 0))
        marker = file.read(1)
        file.seek(before)
        if size < _PCX_PALETTE or marker != b"\x0c":
            raise UnreadableImage("is cut off: its palette is missing")


def _from_16_bits(image: Image.Image, sha256: str, inverted: bool) -> ProbeImage:
    # Pillow decodes 16-bit PNG and PGM files to mode I, which has 32 bits.
    pixels = np.asarray(image).astype(np.int64)
    low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    if low < 0 or high > 65535:
        raise UnreadableImage(f"has 32-bit pixels from {low} to {high}, whose range is unknown")
    if inverted:
        pixels = 65535 - pixels
        high = int(pixels.max()) if pixels.size else 0
    grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    bits = high.bit_length()
    return ProbeImage(grey.convert("RGB"), sha256, grey, _too_dark(bits) if 0 < bits <= _NOT_16_BITS else None)


def _too_dark(bits: int) -> str:
    return (
        f"its 16-bit pixels use {bits} bits at most; 16 bits are scaled to 8, so that it is nearly black: where it was "
        f"taken with fewer bits (a camera's 12, say), write it again over the full range, or in 8 bits"
    )


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head[8:64]
