"""Elements of scenes: colours, letters, patterns, and every object as a list of strokes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

RGB = {
    "red": (205, 40, 40),
    "yellow": (238, 205, 50),
    "green": (50, 145, 60),
    "blue": (45, 90, 210),
    "purple": (140, 60, 170),
    "brown": (125, 78, 40),
    "white": (238, 238, 232),
    "black": (38, 38, 42),
    "glass": (185, 225, 240),
    "skin": (226, 180, 145),
}
"""Ink → its colour."""

GROUND_TONES = {
    "day": ("blue", (150, 192, 238), (165, 203, 242)),
    "dusk": ("purple", (178, 128, 196), (198, 140, 190)),
    "night": ("black", (20, 22, 46), (235, 235, 190)),
    "clouds": ("white", (205, 208, 213), (236, 237, 240)),
    "grass": ("green", (112, 170, 84), (92, 150, 70)),
    "sand": ("yellow", (228, 208, 142), (210, 188, 120)),
    "water": ("blue", (66, 122, 182), (110, 160, 210)),
    "road": ("black", (72, 72, 77), (84, 84, 88)),
}
"""Background → its colour concept, base tone, and tone of its decoration (sun haze, stars, clouds, blades, waves)."""

# Bitmaps of capital letters: five rows, of variable width.
_GLYPHS = {
    letter: np.array([[cell == "#" for cell in row] for row in rows.split("/")])
    for letter, rows in {
        "A": ".#./#.#/###/#.#/#.#",
        "B": "##./#.#/##./#.#/##.",
        "C": ".##/#../#../#../.##",
        "D": "##./#.#/#.#/#.#/##.",
        "E": "###/#../##./#../###",
        "F": "###/#../##./#../#..",
        "G": ".###/#.../#.##/#..#/.###",
        "H": "#.#/#.#/###/#.#/#.#",
        "I": "###/.#./.#./.#./###",
        "L": "#../#../#../#../###",
        "M": "#...#/##.##/#.#.#/#...#/#...#",
        "N": "#..#/##.#/#.##/#..#/#..#",
        "O": "###/#.#/#.#/#.#/###",
        "P": "###/#.#/###/#../#..",
        "R": "##./#.#/##./#.#/#.#",
        "S": "###/#../###/..#/###",
        "T": "###/.#./.#./.#./.#.",
        "U": "#.#/#.#/#.#/#.#/###",
        "W": "#...#/#...#/#.#.#/##.##/#...#",
        "X": "#.#/#.#/.#./#.#/#.#",
    }.items()
}

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _box(left: float, top: float, right: float, bottom: float) -> Shape:
    return lambda u, v: (u >= left) & (u <= right) & (v >= top) & (v <= bottom)


def _oval(x: float, y: float, rx: float, ry: float | None = None) -> Shape:
    return lambda u, v: ((u - x) / rx) ** 2 + ((v - y) / (ry or rx)) ** 2 <= 1


def _wedge(x: float, top: float, bottom: float, half_top: float, half_bottom: float, lean: float = 0.0) -> Shape:
    """A trapezoid with horizontal edges; ``lean`` shifts the lower edge sideways."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        down = (v - top) / (bottom - top)
        half = half_top + (half_bottom - half_top) * down
        return (down >= 0) & (down <= 1) & (np.abs(u - x - lean * down) <= half)

    return shape


def _ring(x: float, y: float, r: float, hole: float) -> Shape:
    return lambda u, v: _oval(x, y, r)(u, v) & ~_oval(x, y, hole)(u, v)


STROKES: dict[str, tuple[tuple[str, str, Shape], ...]] = {
    "house": (
        ("", "main", _box(0.12, 0.4, 0.88, 1)),
        ("roof", "accent", _wedge(0.5, 0, 0.44, 0.03, 0.5)),
        ("window", "glass", _box(0.2, 0.52, 0.38, 0.72)),
        ("window", "glass", _box(0.64, 0.52, 0.82, 0.72)),
        ("door", "brown", _box(0.43, 0.6, 0.59, 1)),
    ),
    "tree": (
        ("trunk", "brown", _box(0.42, 0.5, 0.58, 1)),
        ("", "main", _oval(0.5, 0.22, 0.24, 0.22)),
        ("", "main", _oval(0.32, 0.42, 0.28, 0.22)),
        ("", "main", _oval(0.68, 0.42, 0.28, 0.22)),
    ),
    "car": (
        ("", "main", _wedge(0.48, 0.36, 0.64, 0.2, 0.36)),
        ("window", "glass", _wedge(0.36, 0.42, 0.6, 0.08, 0.14)),
        ("window", "glass", _wedge(0.61, 0.42, 0.6, 0.08, 0.14)),
        ("", "main", _box(0.01, 0.62, 0.99, 0.88)),
        ("wheel", "black", _oval(0.24, 0.86, 0.14)),
        ("wheel", "black", _oval(0.76, 0.86, 0.14)),
        ("wheel", "white", _oval(0.24, 0.86, 0.05)),
        ("wheel", "white", _oval(0.76, 0.86, 0.05)),
    ),
    "boat": (
        ("", "brown", _box(0.46, 0.04, 0.51, 0.75)),
        ("sail", "accent", _wedge(0.54, 0.04, 0.66, 0, 0.2, lean=0.2)),
        ("sail", "accent", _wedge(0.44, 0.16, 0.66, 0, 0.14, lean=-0.14)),
        ("hull", "main", _wedge(0.5, 0.7, 1, 0.5, 0.32)),
    ),
    "face": (
        ("", "main", _oval(0.5, 0.4, 0.46, 0.4)),
        ("", "skin", _oval(0.5, 0.56, 0.38, 0.44)),
        ("eye", "white", _oval(0.34, 0.48, 0.11, 0.08)),
        ("eye", "white", _oval(0.66, 0.48, 0.11, 0.08)),
        ("eye", "black", _oval(0.34, 0.48, 0.055, 0.07)),
        ("eye", "black", _oval(0.66, 0.48, 0.055, 0.07)),
        ("mouth", "red", _oval(0.5, 0.78, 0.18, 0.06)),
    ),
    "animal": (
        ("leg", "main", _box(0.12, 0.6, 0.21, 1)),
        ("leg", "main", _box(0.27, 0.6, 0.36, 1)),
        ("leg", "main", _box(0.52, 0.6, 0.61, 1)),
        ("leg", "main", _box(0.66, 0.6, 0.75, 1)),
        ("", "main", _wedge(0.03, 0.28, 0.6, 0.03, 0.05, lean=0.1)),
        ("", "main", _box(0.1, 0.45, 0.76, 0.74)),
        ("", "main", _oval(0.8, 0.38, 0.18, 0.17)),
        ("", "accent", _wedge(0.72, 0.14, 0.4, 0.02, 0.08)),
        ("eye", "white", _oval(0.86, 0.34, 0.06)),
        ("", "black", _oval(0.97, 0.41, 0.04)),
    ),
    "flower": (
        ("", "green", _box(0.46, 0.5, 0.54, 1)),
        ("", "green", _oval(0.66, 0.84, 0.16, 0.07)),
        *(
            ("petal", "main", _oval(0.5 + 0.22 * np.cos(a), 0.32 + 0.22 * np.sin(a), 0.14))
            for a in np.arange(6) * np.pi / 3
        ),
        ("", "accent", _oval(0.5, 0.32, 0.13)),
    ),
    "sign": (
        ("post", "brown", _box(0.45, 0.4, 0.55, 1)),
        ("", "main", _box(0.0, 0.08, 1.0, 0.54)),
    ),
    "cup": (
        ("handle", "main", _ring(0.76, 0.55, 0.24, 0.14)),
        ("", "main", _wedge(0.42, 0.22, 1, 0.36, 0.28)),
        ("", "accent", _oval(0.42, 0.24, 0.36, 0.08)),
    ),
    "ball": (
        ("", "main", _oval(0.5, 0.5, 0.49)),
        ("", "white", _oval(0.34, 0.3, 0.1, 0.07)),
    ),
    "lamp": (
        ("post", "black", _box(0.46, 0.4, 0.54, 0.95)),
        ("", "black", _wedge(0.5, 0.9, 1, 0.14, 0.26)),
        ("shade", "main", _wedge(0.5, 0.02, 0.46, 0.18, 0.42)),
    ),
    "bird": (
        ("leg", "black", _box(0.44, 0.8, 0.48, 1)),
        ("leg", "black", _box(0.58, 0.8, 0.62, 1)),
        ("", "main", _wedge(0.2, 0.42, 0.62, 0.2, 0.02, lean=0.1)),
        ("", "main", _oval(0.5, 0.62, 0.32, 0.22)),
        ("", "main", _oval(0.76, 0.36, 0.16)),
        ("", "yellow", _wedge(0.93, 0.32, 0.44, 0.06, 0.02)),
        ("eye", "black", _oval(0.8, 0.33, 0.045)),
        ("wing", "accent", _oval(0.42, 0.6, 0.2, 0.13)),
    ),
}
"""Objects as lists of strokes, back to front: (part or "", ink, shape in the unit square).

The inks ``main`` (the object's colour, with its texture) and ``accent`` (a second colour) vary between scenes.
"""


@lru_cache(maxsize=64)
def letters_of(word: str, scale: int) -> np.ndarray:
    """A word's pixels, bool (5·scale, width·scale)."""
    gap = np.zeros((5, 1), dtype=bool)
    columns = [column for letter in word.upper() for column in (_GLYPHS[letter], gap)][:-1]
    return np.kron(np.concatenate(columns, axis=1), np.ones((scale, scale), dtype=bool))


def patterned(texture: str, size: int) -> np.ndarray:
    """The pixels with a texture's second tone, bool (size, size); small objects have a finer pattern."""
    period = 6 if size > 24 else 4
    row, column = np.mgrid[:size, :size]
    if texture == "striped":
        return column % period < period // 2
    if texture == "checkered":
        return (column // (period // 2) + row // (period // 2)) % 2 == 0
    if texture == "dotted":
        half = period / 2 - 0.5
        return (column % period - half) ** 2 + (row % period - half) ** 2 <= (period / 3) ** 2
    return np.zeros((size, size), dtype=bool)


def mix(rgb: Iterable[int], other: int, share: float) -> tuple[int, int, int]:
    """Mixes a colour with a share of grey of the tone ``other``."""
    red, green, blue = (int(channel * (1 - share) + other * share) for channel in rgb)
    return red, green, blue
