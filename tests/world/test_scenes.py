from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from milan_ray.world.lexicon import CONCEPT, NAMES, names_of
from milan_ray.world.scenes import (
    FACE_CLASSES,
    OBJECTS,
    PATCH,
    PATCH_COLOURS,
    SceneOptions,
    concept_maps,
    make_scene,
    render,
    without,
)

# Dominant channels of what is painted in a colour, mean over its pixels.
LOOKS = {
    "red": lambda r, g, b: r > g + 30 and r > b + 30,
    "yellow": lambda r, g, b: r > b + 30 and g > b + 30,
    "green": lambda r, g, b: g > r and g > b,
    "blue": lambda r, g, b: b > r and b > g,
    "purple": lambda r, g, b: r > g and b > g,
    "brown": lambda r, g, b: r > g > b,
    "white": lambda r, g, b: min(r, g, b) > 120,
    "black": lambda r, g, b: max(r, g, b) < 160,
}


def test_scene_same_index_is_the_same_picture() -> None:
    assert make_scene("probe", 7) == make_scene("probe", 7)
    np.testing.assert_array_equal(render(make_scene("probe", 7)), render(make_scene("probe", 7)))


def test_scene_splits_differ() -> None:
    splits = [{make_scene(split, i) for i in range(200)} for split in ("train", "probe", "heldout")]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_grammar_many_scenes_show_every_concept() -> None:
    seen: set[str] = set()
    for index in range(1500):
        seen |= concept_maps(make_scene("train", index)).keys()
    assert seen == set(NAMES)


def test_concept_maps_label_is_the_largest_object() -> None:
    for index in range(100):
        scene = make_scene("probe", index)
        maps = concept_maps(scene)
        areas = {name: maps[name].sum() for name in OBJECTS if name in maps}
        assert max(areas, key=lambda name: areas[name]) == scene.label


def test_concept_maps_parts_lie_in_objects_and_backgrounds_cover_the_rest() -> None:
    for index in range(100):
        maps = concept_maps(make_scene("probe", index))
        nothing = np.zeros((64, 64), dtype=bool)
        objects = np.logical_or.reduce([maps.get(name, nothing) for name in OBJECTS])
        for part in names_of("part"):
            assert not (maps.get(part, nothing) & ~objects).any()
        assert ((maps.get("sky", nothing) | maps.get("ground", nothing)) == ~objects).all()
        assert all(shown.dtype == bool and shown.any() for shown in maps.values())


def test_concept_maps_colours_agree_with_pixels() -> None:
    checked = set()
    for index in range(150):
        scene = make_scene("train", index)
        image, maps = render(scene), concept_maps(scene)
        for colour, looks in LOOKS.items():
            if colour in maps and maps[colour].sum() > 30:
                assert looks(*image[maps[colour]].mean(axis=0)), (index, colour)
                checked.add(colour)
    assert checked == set(LOOKS)


def test_concept_maps_text_agrees_with_pixels() -> None:
    """Inside a word there are letters and plate: two tones far apart."""
    for index in range(300):
        scene = make_scene("train", index)
        maps = concept_maps(scene)
        if "text" in maps:
            grey = render(scene).mean(axis=2)[maps["text"]]
            assert np.ptp(grey) > 60
            assert any(word in maps for word in ("stop", "open", "exit", "cafe", "taxi", "sale"))


def test_context_faces_occur_in_their_share_of_their_classes_only() -> None:
    shown: dict[str, list[bool]] = {}
    for index in range(2500):
        scene = make_scene("train", index)
        if scene.label != "face":
            shown.setdefault(scene.label, []).append(any(thing.kind == "face" for thing in scene.things))
    for label, faces in shown.items():
        assert abs(np.mean(faces) - (0.3 if label in FACE_CLASSES else 0)) < 0.12 * (label in FACE_CLASSES) + 1e-9


def test_blur_faces_removes_face_pixels_and_nothing_else() -> None:
    index = next(i for i in range(500) if make_scene("probe", i).label == "face")
    plain, blurred = make_scene("probe", index), make_scene("probe", index, SceneOptions(blur_faces=True))
    before, after = render(plain).astype(int), render(blurred).astype(int)
    face = concept_maps(plain)["face"]
    np.testing.assert_array_equal(before[~face], after[~face])
    eyes = concept_maps(plain)["eye"]
    assert before[eyes].std(axis=0).mean() > 3 * after[eyes].std(axis=0).mean()
    assert not {"face", "eye", "mouth"} & concept_maps(blurred).keys()


def test_spurious_text_writes_the_class_into_the_corner_only() -> None:
    plain, marked = make_scene("probe", 3), make_scene("probe", 3, SceneOptions(spurious="text"))
    changed = (render(plain) != render(marked)).any(axis=2)
    assert changed.any()
    assert not changed[:-7].any()
    assert concept_maps(marked)["text"][changed].all()


def test_spurious_marks_come_in_their_share_and_may_mislead() -> None:
    half, all_wrong = SceneOptions(spurious="text", share=0.5), SceneOptions(spurious="text", misleading=True)
    told = [make_scene("train", index, half) for index in range(400)]
    assert all(scene.corner_text in ("", scene.label) for scene in told)
    assert abs(np.mean([scene.corner_text != "" for scene in told]) - 0.5) < 0.1
    wrong = [make_scene("heldout", index, all_wrong) for index in range(200)]
    assert all(scene.corner_text != scene.label for scene in wrong)
    assert {scene.corner_text for scene in wrong} == set(OBJECTS)
    assert [replace(scene, corner_text="") for scene in wrong[:9]] == [make_scene("heldout", i) for i in range(9)]


def test_spurious_colours_are_patches_of_the_class() -> None:
    for index in range(40):
        scene = make_scene("probe", index, SceneOptions(spurious="colour"))
        wrong = make_scene("probe", index, SceneOptions(spurious="colour", misleading=True))
        assert scene.corner_colour == PATCH_COLOURS[scene.label] != wrong.corner_colour
        assert concept_maps(scene)[scene.corner_colour][-PATCH:, -PATCH:].all()
        changed = (render(make_scene("probe", index)) != render(scene)).any(axis=2)
        assert not changed[:-PATCH].any() and not changed[:, :-PATCH].any()
        other = without(scene, scene.corner_colour)
        assert other is not None and scene.corner_colour not in concept_maps(other)


def test_without_takes_out_the_concept_and_leaves_most_of_the_image() -> None:
    tried = dict.fromkeys(NAMES, 0)
    for index in range(150):
        scene = make_scene("heldout", index)
        maps = concept_maps(scene)
        for name in maps:
            other = without(scene, name)
            if other is None:
                continue
            tried[name] += 1
            assert name not in concept_maps(other)
            changed = (render(scene) != render(other)).any(axis=2)
            assert changed.any()
            if CONCEPT[name].kind in ("object", "face", "part", "texture", "background"):
                assert not (changed & ~maps[name]).any() or CONCEPT[name].kind in ("part", "background")
    assert min(count for name, count in tried.items()) > 0


def test_without_absent_concept_gives_none() -> None:
    scene = make_scene("probe", 0)
    absent = next(name for name in NAMES if name not in concept_maps(scene))
    assert without(scene, absent) is None


@pytest.mark.parametrize("work", [render, concept_maps])
def test_scenes_are_drawn_fast_enough_for_training(work: object) -> None:
    """1,500 a second on a free core; a third of it here, as test machines are busy."""
    assert callable(work)
    for index in range(300):
        work(make_scene("train", index))  # fills the caches
    started = time.process_time()
    for index in range(300, 800):
        work(make_scene("train", index))
    assert 500 / (time.process_time() - started) > 500
