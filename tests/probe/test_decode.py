from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from milan_ray.errors import UnreadableImage
from milan_ray.probe.decode import MAX_PIXELS, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "JPEG", "WEBP"])
def test_decode_formats_give_rgb(kind: str) -> None:
    image = decode(encode(RGB, kind))
    assert (image.mode, image.size) == ("RGB", (13, 9))
    if kind in ("PNG", "BMP", "PPM", "TIFF"):
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA"])
def test_decode_modes_agree_with_torchvision_s_loader(mode: str) -> None:
    data = encode(RGB.convert("RGBA").convert(mode) if mode != "P" else RGB.quantize(7))
    np.testing.assert_array_equal(decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_decode_alpha_is_dropped_not_composited() -> None:
    image = RGB.copy()
    image.putalpha(Image.new("L", RGB.size, 0))
    np.testing.assert_array_equal(decode(encode(image)), PIXELS)


def test_decode_cmyk_jpeg_comes_back_in_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    np.testing.assert_allclose(np.asarray(decode(encode(red, "JPEG")))[8, 8], (200, 30, 40), atol=6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_16_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 65535]], dtype=np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    image = decode(encode(Image.fromarray(values), kind))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)


def test_decode_16_bits_rgb_png_takes_the_high_bytes() -> None:
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x80FF)
    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(data), [[[0x12, 0x56, 0x9A], [0xFF, 0, 0x80]]])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_decode_animation_gives_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    options = {} if kind in ("GIF", "TIFF") else {"lossless": True}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(np.asarray(decode(data))[0, 0], (250, 0, 0))


def test_decode_exif_orientation_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(RGB, "JPEG", exif=exif.tobytes())).size == RGB.size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, I am a text", "is no image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
        (encode(RGB, "JPEG")[:-40], "truncated"),
        (encode(RGB)[:-30], "cannot be decoded"),
        (encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_decode_bad_bytes_are_unreadable_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data)
    assert " at 0x" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])
def test_decode_bomb_is_refused_by_its_header(side: int) -> None:
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    with pytest.raises(UnreadableImage, match=f"more than {MAX_PIXELS:,}"):
        decode(data + png_chunk(b"IEND", b""))


SAMPLES = [encode(RGB, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.filterwarnings("ignore::Warning")  # Pillow's remarks about what was broken
@settings(max_examples=600, deadline=None)
@given(st.one_of(st.binary(max_size=200), mutated()))
def test_decode_any_bytes_give_rgb_or_unreadable(data: bytes) -> None:
    try:
        image = decode(data)
    except UnreadableImage as error:
        assert str(error)
    else:
        assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8
