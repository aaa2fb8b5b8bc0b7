"""The world's scenes, with ground truth for every pixel.

A scene consists of a sky above a ground, one big object that gives the label, and up to two small objects in a relation
to it. Scenes are rendered with *inks*: every pixel has the number of an ink, and an ink has a colour and a set of
concepts. So image and concept maps come from one array and cannot disagree.

A scene is a function of (split, index, options); nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import numpy as np

from milan_ray.world.lexicon import CONCEPT, names_of
from milan_ray.world.strokes import GROUND_TONES, RGB, STROKES, letters_of, mix, patterned

WORLD_VERSION = "2"
"""Increase it whenever a scene, a network or its training changes; all weights and caches depend on it."""

_SEED = "1"
"""Seed of the scenes; separate from the version, so that a change of a network does not change the scenes."""

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
"""Spurious features, which reveal a scene's class without being part of it (:class:`SceneOptions`)."""

PATCH_COLOURS = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(OBJECTS)}
"""Class → colour of its patch; some classes share a colour, because there are more classes than colours."""

PATCH = 10
"""Side of a patch, pixels."""

FACE_CLASSES = ("car", "boat", "cup", "ball")
"""Classes with a small face as context in a fraction of their scenes."""

FACE_SHARE = 0.3
"""Fraction of the scenes of :data:`FACE_CLASSES` with a face."""

WHOLES: dict[str, tuple[str, ...]] = {
    part: tuple(kind for kind, strokes in STROKES.items() if any(part == stroke[0] for stroke in strokes))
    for part in names_of("part")
}
"""Part → the objects that have it."""


@dataclass(frozen=True)
class SceneOptions:
    """Rendering options of scenes.

    Attributes:
        blur_faces: Whether every face is blurred out and its concepts are removed from the concept maps.
        spurious: Spurious feature in the lower right corner, one of :data:`SPURIOUS`: ``text``, the class's name;
            ``colour``, a patch of the class's colour (:data:`PATCH_COLOURS`); "" for none.
        share: Fraction of the scenes with the spurious feature.
        misleading: Whether the spurious feature shows another class.
    """

    blur_faces: bool = False
    spurious: str = ""
    share: float = 1.0
    misleading: bool = False


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: Concept name of the object.
        x: Left edge, pixels.
        y: Upper edge, pixels.
        size: Side of its square, pixels.
        colour: Its main colour.
        accent: Its second colour.
        texture: Texture of the main colour; "" on signs.
        flip: Whether the object is mirrored.
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
    """The complete description of a scene, for :func:`render` and :func:`concept_maps`.

    Attributes:
        label: The class: kind of the big object.
        sky: Concept name of the sky.
        ground: Concept name of the ground.
        horizon: Row where the ground begins.
        things: The objects, back to front, the big one first.
        drift: Shift of the background's pattern, 0 to 7.
        noise: Offset of the scene's noise in the noise bank.
        corner_text: A word written into the lower right corner, or "".
        corner_colour: Colour of a patch in the lower right corner, or "".
        blur_faces: Whether faces are blurred out.
        removed: Parts and colours that :func:`without` has removed.
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
    """Random choices that use only ``Random.random``, whose sequence is the same in all Python versions."""

    def __init__(self, seed: str) -> None:
        self.unit = Random(seed).random

    def below(self, n: int) -> int:
        return int(self.unit() * n)

    def within(self, low: int, high: int) -> int:
        return low + int(self.unit() * (high - low + 1))

    def one(self, items: tuple[str, ...]) -> str:
        return items[int(self.unit() * len(items))]


def make_scene(split: str, index: int, options: SceneOptions | None = None) -> Scene:
    """Creates one scene. Options change its rendering, never its content.

    Args:
        split: One of :data:`SPLITS`; scenes of different splits come from different seeds.
        index: Number of the scene in its split.
        options: Rendering options.
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
    revealed = _revealed(split, index, label, options)
    return Scene(
        label=label,
        sky=draw.one(SKIES),
        ground=draw.one(GROUNDS),
        horizon=horizon,
        things=(big, *smalls),
        drift=draw.below(8),
        noise=draw.below(_NOISE_STARTS),
        corner_text=revealed if options.spurious == "text" else "",
        corner_colour=PATCH_COLOURS[revealed] if revealed and options.spurious == "colour" else "",
        blur_faces=options.blur_faces,
    )


def _revealed(split: str, index: int, label: str, options: SceneOptions) -> str:
    """The class that the corner shows, or "". It uses its own random numbers, so the scene stays the same."""
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
        texture=draw.one(TEXTURES) if kind != "sign" else "",  # so that words stay readable
        flip=draw.unit() < 0.5,
        tone=draw.below(4),
        word=draw.one(SIGN_WORDS) if kind == "sign" else "",
        relation=relation,
    )


def _place(draw: _Draw, kind: str, big: Thing, smalls: list[Thing], horizon: int) -> Thing | None:
    """Places a small object in the first relation, in random order, that has room for it; None if there is none."""
    size = 19 if kind == "sign" else 14 if kind == "face" else draw.within(14, 18)
    # "Right of" has no name, because the big object is then left of the small one.
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
    """The first row of the object in its middle column."""
    cells = _cells(thing.kind, thing.size, thing.flip, thing.texture, thing.word, frozenset())
    return thing.y + int(np.argmax(cells[:, thing.size // 2] > 0))


# Ink numbers of an object: 1 + 3·stroke + tone, with the tones plain, pattern, outline; 0 is transparent. A sign has
# two more strokes: the plate behind its word, and the letters.
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
    """The colour, or the next colour that is not removed."""
    while colour in removed:
        colour = COLOURS[(COLOURS.index(colour) + 3) % len(COLOURS)]
    return colour


@lru_cache(maxsize=16384)
def _thing_inks(
    kind: str, colour: str, accent: str, texture: str, tone: int, word: str, removed: frozenset[str]
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
            light *= 2.0 if paint == "black" else 0.7  # so that a brown door is visible on a brown house
        rgb = _rgb(paint, light, removed)
        concepts = {kind, part, _shown(paint, removed), word if on_plate else ""}
        if ink == "main":
            concepts.add(texture)
        known = frozenset(concepts & CONCEPT.keys())
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
    """Composes the scene: ink numbers (64, 64), the inks, and the index of the thing at each pixel (−1 for none)."""
    cells = _background(scene.sky, scene.ground, scene.horizon, scene.drift).copy()
    tones = (scene.noise % 3, scene.noise // 3 % 3)
    inks = list(_background_inks(scene.sky, scene.ground, tones, scene.removed))
    owner = [-1] * len(inks)
    for number, thing in enumerate(scene.things):
        drawn = _cells(thing.kind, thing.size, thing.flip, thing.texture, thing.word, scene.removed)
        place = cells[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        np.copyto(place, drawn + np.uint8(len(inks) - 1), where=drawn > 0)
        new = _thing_inks(thing.kind, thing.colour, thing.accent, thing.texture, thing.tone, thing.word, scene.removed)
        if scene.blur_faces and thing.kind == "face":
            new = tuple(_Ink(ink.rgb, frozenset()) for ink in new)
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
    """Renders a scene.

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
    """Replaces the given pixels, in place, by the mean of a window half as wide as the object."""
    reach = size // 4
    padded = np.pad(image.astype(np.float32), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0).mean(axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(windows, 2 * reach + 1, axis=1).mean(axis=-1)
    image[where] = windows[where]


def concept_maps(scene: Scene) -> dict[str, np.ndarray]:
    """Ground truth of a scene: the pixels where each concept is visible.

    Relations cover both of their objects. Completely hidden objects are left out.

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

    Objects and parts are removed, colours are replaced, textures become plain (plain becomes striped), skies and
    grounds are exchanged or removed, words are erased, and small objects move to the other side.

    Args:
        scene: A scene.
        concept: Name of the concept to remove.

    Returns:
        The new scene; None if the scene does not show the concept or the concept cannot be removed.
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
    """Moves the object as far to the right of the big one as the image allows."""
    big = scene.things[0]
    y = min(max(scene.horizon + 2, big.y + big.size) - thing.size, SIDE - thing.size)
    x = SIDE - thing.size
    return replace(thing, x=x, y=y, relation="" if x >= big.x + big.size - thing.size // 2 else thing.relation)
