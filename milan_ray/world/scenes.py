"""The world's grammar: scenes with a known truth for every pixel.

A scene is a sky over a ground, one big object that gives the label, and up to two small ones that stand in a relation
to it. Drawing goes through *inks*: every pixel gets the number of an ink, and an ink knows its colour and the concepts
it stands for, so image and concept maps come from one array and cannot disagree.

Everything follows from (split, index, options): nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import numpy as np

from milan_ray.world.lexicon import CONCEPT, names_of
from milan_ray.world.strokes import GROUND_TONES, RGB, STROKES, letters_of, mix, patterned

WORLD_VERSION = "2"
"""Raise it whenever a scene, a network or its training changes: all weights and caches follow."""

_SEED = "1"
"""What scenes are drawn from: apart from the version, so that a change of a network leaves the scenes as they were."""

SIDE = 64
"""Height and width of every scene, pixels."""

SPLITS = ("train", "probe", "heldout")

OBJECTS = names_of("object", "face")
COLOURS = names_of("colour")
TEXTURES = names_of("texture")
RELATIONS = names_of("relation")
SIGN_WORDS = ("stop", "open", "exit", "cafe", "taxi", "sale")
SKIES = ("day", "dusk", "night", "clouds")
GROUNDS = ("grass", "sand", "water", "road")

SPURIOUS = ("", "text", "colour")
"""What may give a scene's class away without being part of it (:class:`SceneOptions`)."""

PATCH_COLOURS = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(OBJECTS)}
"""Class → colour of its patch; there are more classes than colours, so that some share one."""

PATCH = 10
"""Side of a patch, pixels."""

FACE_CLASSES = ("car", "boat", "cup", "ball")
"""Classes of which a share of scenes shows a small face as context."""

FACE_SHARE = 0.3
"""That share."""

WHOLES: dict[str, tuple[str, ...]] = {
    part: tuple(kind for kind, strokes in STROKES.items() if any(part == stroke[0] for stroke in strokes))
    for part in names_of("part")
}
"""Which objects have a part."""


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are shown.

    Attributes:
        blur_faces: Blur every face out; its concepts leave the concept maps.
        spurious: What gives the class away in the lower right corner, one of :data:`SPURIOUS`: ``text``, its name;
            ``colour``, a patch of its colour (:data:`PATCH_COLOURS`); "" for nothing.
        share: Share of the scenes that have it.
        misleading: It speaks of another class.
    """

    blur_faces: bool = False
    spurious: str = ""
    share: float = 1.0
    misleading: bool = False


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: Which object.
        x: Left edge, pixels.
        y: Upper edge, pixels.
        size: Side of its square, pixels.
        colour: Its main colour.
        accent: Its second colour.
        texture: Texture of the main colour; "" on signs.
        flip: Whether it is mirrored.
        tone: Brightness step, 0 to 3.
        word: The word on a sign.
        relation: Its relation to the big object, or "".
    """

    kind: str
    x: int
    y: int
    size: int
    colour: str
    accent: str
    texture: str
    flip: bool = False
    tone: int = 2
    word: str = ""
    relation: str = ""


@dataclass(frozen=True)
class Scene:
    """A scene, complete: :func:`render` and :func:`concept_maps` need nothing else.

    Attributes:
        label: The class: kind of the big object.
        sky: Which sky.
        ground: Which ground.
        horizon: Row where the ground begins.
        things: The objects, back to front, the big one first.
        drift: Shift of the background's pattern, 0 to 7.
        noise: Where in the noise bank the scene's noise begins.
        corner_text: A word written into the lower right corner, or "".
        corner_colour: Colour of a patch in the lower right corner, or "".
        blur_faces: Whether faces are blurred out.
        removed: Parts left out and colours painted over (by :func:`without`).
    """

    label: str
    sky: str
    ground: str
    horizon: int
    things: tuple[Thing, ...]
    drift: int = 0
    noise: int = 0
    corner_text: str = ""
    corner_colour: str = ""
    blur_faces: bool = False
    removed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Ink:
    rgb: tuple[int, int, int]
    concepts: frozenset[str]


class _Draw:
    """Draws from lists with nothing but ``Random.random``, whose sequence Python guarantees over versions."""

    def __init__(self, seed: str) -> None:
        self.unit = Random(seed).random

    def below(self, n: int) -> int:
        return int(self.unit() * n)

    def within(self, low: int, high: int) -> int:
        return low + int(self.unit() * (high - low + 1))

    def one(self, items: tuple[str, ...]) -> str:
        return items[int(self.unit() * len(items))]


def make_scene(split: str, index: int, options: SceneOptions | None = None) -> Scene:
    """Makes one scene. Options change how it is shown, never what it is.

    Args:
        split: One of :data:`SPLITS`; scenes of different splits come from different seeds.
        index: Number of the scene in its split.
        options: How it is shown.
    """
    options = options or SceneOptions()
    draw = _Draw(f"{_SEED}/{split}/{index}")
    label = draw.one(OBJECTS)
    horizon = draw.within(26, 40)
    size = draw.within(36, 39) if label == "sign" else draw.within(30, 38)
    bottom = draw.within(max(horizon + 4, size), SIDE - 1)
    big = _thing(draw, label, size, draw.within(0, SIDE - size), bottom - size, "")
    smalls: list[Thing] = []
    with_face = label in FACE_CLASSES and draw.unit() < FACE_SHARE
    chance = draw.unit()
    count = 0 if chance < 0.3 else 1 if chance < 0.7 else 2
    for number in range(max(count, int(with_face))):
        kind = "face" if with_face and number == 0 else draw.one(tuple(k for k in OBJECTS if k not in (label, "face")))
        small = _place(draw, kind, big, smalls, horizon)
        if small is not None:
            smalls.append(small)
    told = _told(split, index, label, options)
    return Scene(
        label=label,
        sky=draw.one(SKIES),
        ground=draw.one(GROUNDS),
        horizon=horizon,
        things=(big, *smalls),
        drift=draw.below(8),
        noise=draw.below(_NOISE_STARTS),
        corner_text=told if options.spurious == "text" else "",
        corner_colour=PATCH_COLOURS[told] if told and options.spurious == "colour" else "",
        blur_faces=options.blur_faces,
    )


def _told(split: str, index: int, label: str, options: SceneOptions) -> str:
    """The class that the corner speaks of; "" where it is silent. Its draws are its own: the scene stays the same."""
    if not options.spurious:
        return ""
    draw = _Draw(f"{_SEED}/corner/{split}/{index}")
    if draw.unit() >= options.share:
        return ""
    looks = PATCH_COLOURS if options.spurious == "colour" else dict(zip(OBJECTS, OBJECTS, strict=True))
    return draw.one(tuple(kind for kind in OBJECTS if looks[kind] != looks[label])) if options.misleading else label


def _thing(draw: _Draw, kind: str, size: int, x: int, y: int, relation: str) -> Thing:
    colour = draw.below(len(COLOURS))
    accent = (colour + 1 + draw.below(len(COLOURS) - 1)) % len(COLOURS)
    return Thing(
        kind=kind,
        x=x,
        y=y,
        size=size,
        colour=COLOURS[colour],
        accent=COLOURS[accent],
        texture=draw.one(TEXTURES) if kind != "sign" else "",  # words stay readable
        flip=draw.unit() < 0.5,
        tone=draw.below(4),
        word=draw.one(SIGN_WORDS) if kind == "sign" else "",
        relation=relation,
    )


def _place(draw: _Draw, kind: str, big: Thing, smalls: list[Thing], horizon: int) -> Thing | None:
    """A small object in the first of the relations, in random order, that has room for it."""
    size = 19 if kind == "sign" else 14 if kind == "face" else draw.within(14, 18)
    # "Right of" needs no name: it is the big object that is to the left then.
    orders = ["left of", "", "above", "on"]
    for step in range(3, 0, -1):
        other = draw.below(step + 1)
        orders[step], orders[other] = orders[other], orders[step]
    foot = max(horizon + 2, big.y + big.size - draw.below(6))
    for relation in orders:
        if relation == "left of":
            low, high, y = 0, big.x - size + 3, foot - size
        elif relation == "":
            low, high, y = big.x + big.size - 3, SIDE - size, foot - size
        else:
            centre = big.x + (big.size - size) // 2
            low, high = max(0, centre - 3), min(SIDE - size, centre + 3)
            y = big.y - size - 4 - draw.below(4) if relation == "above" else _top(big) - size + 1
        if high < low or y < 0 or any(abs(y - s.y) < size and s.relation == relation for s in smalls):
            continue
        x = draw.within(low, high)
        if any(abs(x - s.x) < size - 2 and abs(y - s.y) < size - 2 for s in smalls):
            continue
        return _thing(draw, kind, size, x, min(y, SIDE - size), relation)
    return None


def _top(thing: Thing) -> int:
    """Row where the object's middle column begins."""
    cells = _cells(thing.kind, thing.size, thing.flip, thing.texture, thing.word, frozenset())
    return thing.y + int(np.argmax(cells[:, thing.size // 2] > 0))


# Inks of an object: 1 + 3·stroke + tone, with the tones plain, pattern, outline; 0 leaves the background. A sign's
# two further strokes are the plate behind its word and the letters.
@lru_cache(maxsize=8192)
def _cells(kind: str, size: int, flip: bool, texture: str, word: str, removed: frozenset[str]) -> np.ndarray:
    """The object's ink numbers, uint8 (size, size)."""
    v, u = (np.mgrid[:size, :size] + 0.5) / size
    strokes = STROKES[kind]
    pattern = patterned(texture, size)
    cells = np.zeros((size, size), dtype=np.uint8)
    for number, (part, ink, shape) in enumerate(strokes):
        if part not in removed:
            cells = np.where(shape(u, v), 1 + 3 * number + (pattern if ink == "main" else 0), cells)
    inside = np.pad(cells > 0, 1)
    edge = ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]) & (cells > 0)
    cells = np.where(edge, (cells - 1) // 3 * 3 + 3, cells)
    if flip:
        cells = cells[:, ::-1]
    cells = cells.astype(np.uint8)
    if word:
        letters = letters_of(word, 2 if size > 24 else 1)
        height, width = letters.shape
        top, left = round(0.31 * size - height / 2), (size - width) // 2
        plate = 1 + 3 * len(strokes)
        cells[top : top + height, left : left + width] = np.where(letters, plate + 3, plate)
    return cells


def _rgb(ink: str, tone: float, removed: frozenset[str]) -> tuple[int, int, int]:
    red, green, blue = (min(255, int(channel * tone)) for channel in RGB[_shown(ink, removed)])
    return red, green, blue


def _shown(colour: str, removed: frozenset[str]) -> str:
    """The colour, or the next one that is not painted over."""
    while colour in removed:
        colour = COLOURS[(COLOURS.index(colour) + 3) % len(COLOURS)]
    return colour


@lru_cache(maxsize=16384)
def _thing_inks(
    kind: str, colour: str, accent: str, texture: str, tone: int, word: str, removed: frozenset[str], blurred: bool
) -> tuple[_Ink, ...]:
    """The inks of an object, in the order of :func:`_cells` (ink 1 first)."""
    inks: list[_Ink] = []
    strokes: list[tuple[str, str]] = [(part, ink) for part, ink, _ in STROKES[kind]]
    letters = "white" if sum(RGB[_shown(colour, removed)]) < 400 else "black"
    if word:
        strokes += [("text", "main"), ("text", letters)]
    for number, (part, ink) in enumerate(strokes):
        paint = {"main": colour, "accent": accent}.get(ink, ink)
        on_plate = word and number >= len(strokes) - 2
        light = 1.0 if on_plate and ink != "main" else 0.82 + 0.08 * tone
        if paint == colour and ink != "main":
            light *= 2.0 if paint == "black" else 0.7  # a brown door shows on a brown house
        rgb = _rgb(paint, light, removed)
        concepts = {kind, part, _shown(paint, removed), word if on_plate else ""}
        if ink == "main":
            concepts.add(texture)
        known = frozenset() if blurred else frozenset(concepts & CONCEPT.keys())
        second = mix(rgb, 255, 0.6) if sum(rgb) < 480 else mix(rgb, 0, 0.4)
        inks += [_Ink(rgb, known), _Ink(second, known), _Ink(mix(rgb, 0, 0.45), known)]
    return tuple(inks)


@lru_cache(maxsize=4096)
def _background(sky: str, ground: str, horizon: int, drift: int) -> np.ndarray:
    """Ink numbers of the background, uint8 (64, 64): 0 and 1 sky, 2 and 3 ground."""
    row, column = np.mgrid[:SIDE, :SIDE]
    column = column + 7 * drift
    wave = (row + np.round(2 * np.sin(column / 4)).astype(int)) % 7 == 0
    speckle = (row * 37 + column * 61 + row * column * 7) % 97
    decoration = {
        "day": row > horizon - 8,
        "dusk": row % 12 > 7,
        "night": speckle < 3,
        "clouds": np.sin(column / 7 + drift) + np.sin(row / 3.5 + column / 15) > 0.7,
        "grass": speckle < 24,
        "sand": speckle < 9,
        "water": wave,
        "road": speckle < 14,
    }
    return np.where(row < horizon, decoration[sky], 2 + decoration[ground]).astype(np.uint8)


@lru_cache(maxsize=1024)
def _background_inks(sky: str, ground: str, tones: tuple[int, int], removed: frozenset[str]) -> tuple[_Ink, ...]:
    inks = []
    for generic, name, tone in (("sky", sky, tones[0]), ("ground", ground, tones[1])):
        colour, *shades = GROUND_TONES[name]
        shown = _shown(colour, removed)
        for base in shades:
            rgb = mix(base, 0, 0.05 * tone) if shown == colour else RGB[shown]
            inks.append(_Ink(rgb, frozenset({generic, name, shown})))
    return tuple(inks)


_CORNER_INKS = (_Ink((250, 250, 250), frozenset({"text"})), _Ink((15, 15, 15), frozenset({"text"})))
_NOISE_STARTS = 50_000
_NOISE = np.random.RandomState(0).randint(-9, 10, _NOISE_STARTS + SIDE * SIDE * 3).astype(np.int16)


def _compose(scene: Scene) -> tuple[np.ndarray, list[_Ink], np.ndarray]:
    """Draws the scene: ink numbers (64, 64), the inks, and which thing a pixel shows (−1 for none)."""
    cells = _background(scene.sky, scene.ground, scene.horizon, scene.drift).copy()
    tones = (scene.noise % 3, scene.noise // 3 % 3)
    inks = list(_background_inks(scene.sky, scene.ground, tones, scene.removed))
    owner = [-1] * len(inks)
    for number, thing in enumerate(scene.things):
        drawn = _cells(thing.kind, thing.size, thing.flip, thing.texture, thing.word, scene.removed)
        place = cells[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        np.copyto(place, drawn + np.uint8(len(inks) - 1), where=drawn > 0)
        blurred = scene.blur_faces and thing.kind == "face"
        new = _thing_inks(
            thing.kind, thing.colour, thing.accent, thing.texture, thing.tone, thing.word, scene.removed, blurred
        )
        inks += new
        owner += [number] * len(new)
    if scene.corner_text:
        letters = np.pad(letters_of(scene.corner_text, 1), 1)
        height, width = letters.shape
        cells[-height:, -width:] = len(inks) + letters
        inks += _CORNER_INKS
        owner += [-1, -1]
    if scene.corner_colour:
        shown = _shown(scene.corner_colour, scene.removed)
        cells[-PATCH:, -PATCH:] = len(inks)
        inks.append(_Ink(RGB[shown], frozenset({shown})))
        owner.append(-1)
    return cells, inks, np.array(owner)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Returns:
        uint8 (64, 64, 3), RGB.
    """
    cells, inks, owner = _compose(scene)
    image = np.array([ink.rgb for ink in inks], dtype=np.int16)[cells]
    if scene.blur_faces:
        for number, thing in enumerate(scene.things):
            if thing.kind == "face":
                _blur(image, owner[cells] == number, thing.size)
    image += _NOISE[scene.noise : scene.noise + image.size].reshape(image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, where: np.ndarray, size: int) -> None:
    """Replaces some pixels by the mean of a window as wide as half the object, in place."""
    reach = size // 4
    padded = np.pad(image.astype(np.float32), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0).mean(axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(windows, 2 * reach + 1, axis=1).mean(axis=-1)
    image[where] = windows[where]


def concept_maps(scene: Scene) -> dict[str, np.ndarray]:
    """The truth of a scene: where each concept is visible.

    Relations cover both of their objects. Objects hidden behind others are not there.

    Returns:
        Concept name → bool (64, 64), only for concepts with at least one pixel.
    """
    cells, inks, owner = _compose(scene)
    used = np.bincount(cells.ravel(), minlength=len(inks)) > 0
    member: dict[str, np.ndarray] = {}
    for number, ink in enumerate(inks):
        if used[number]:
            for concept in ink.concepts:
                member.setdefault(concept, np.zeros(len(inks), dtype=bool))[number] = True
    for number, thing in enumerate(scene.things):
        if thing.relation and (used & (owner == number)).any():
            pair = (owner == number) | (owner == 0)
            member[thing.relation] = member.get(thing.relation, False) | pair
    return {concept: inks_of[cells] for concept, inks_of in member.items()}


def without(scene: Scene, concept: str) -> Scene | None:
    """The same scene without one concept, for causal pairs.

    Objects disappear, parts are left out, colours are painted over with another, textures become plain (plain becomes
    striped), skies and grounds are exchanged or taken away, words are wiped off, small objects move to the other side.

    Args:
        scene: A scene.
        concept: Name of the concept to take out.

    Returns:
        The other scene; None when the scene does not show the concept or cannot lose it.
    """
    if concept not in concept_maps(scene):
        return None
    changed = _lose(scene, concept)
    return None if concept in concept_maps(changed) else changed


def _lose(scene: Scene, concept: str) -> Scene:
    kind = CONCEPT[concept].kind
    if kind in ("part", "colour"):
        return replace(scene, removed=scene.removed | {concept})
    if concept == "sky":
        return replace(scene, horizon=0)
    if concept == "ground":
        return replace(scene, horizon=SIDE)
    if concept in SKIES:
        return replace(scene, sky=SKIES[(SKIES.index(concept) + 1) % len(SKIES)])
    if concept in GROUNDS:
        return replace(scene, ground=GROUNDS[(GROUNDS.index(concept) + 1) % len(GROUNDS)])
    if kind == "text":
        things = tuple(replace(t, word="") if concept in ("text", t.word) else t for t in scene.things)
        return replace(scene, things=things, corner_text="" if concept == "text" else scene.corner_text)
    if kind == "texture":
        other = "plain" if concept != "plain" else "striped"
        return replace(
            scene, things=tuple(replace(t, texture=other) if t.texture == concept else t for t in scene.things)
        )
    if kind == "relation":
        return replace(scene, things=tuple(_move(t, scene) if t.relation == concept else t for t in scene.things))
    kept = tuple(t for t in scene.things if t.kind != concept)
    if scene.things[0].kind == concept:
        kept = tuple(replace(t, relation="") for t in kept)
    return replace(scene, things=kept)


def _move(thing: Thing, scene: Scene) -> Thing:
    """The object, as far to the right of the big one as the image allows."""
    big = scene.things[0]
    y = min(max(scene.horizon + 2, big.y + big.size) - thing.size, SIDE - thing.size)
    x = SIDE - thing.size
    return replace(thing, x=x, y=y, relation="" if x >= big.x + big.size - thing.size // 2 else thing.relation)
