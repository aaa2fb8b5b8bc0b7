"""Counting units beside concepts: exact, mergeable, and what a dense computation finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from milan_ray.exemplars import concepts
from milan_ray.exemplars.concepts import (
    ConceptCounts,
    ImageMasks,
    areas,
    grid_size,
    iou,
    pack_words,
    sample,
    shared,
)
from milan_ray.models.view import View

UNITS, NAMES, SIZE = 5, ("boat", "car", "sea", "sky"), (5, 7)


def random_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[ImageMasks]]:
    """Masks bool (N, U, h, w), concept maps bool (N, C, h, w), and both as the counter takes them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, UNITS, *SIZE)) < 0.3
    masks[rng.random((count, UNITS)) < 0.4] = False
    shown = rng.random((count, len(NAMES), *SIZE)) < 0.4
    shown[rng.random((count, len(NAMES))) < 0.3] = False
    return masks, shown, [seen(*pair) for pair in zip(masks, shown, strict=True)]


def seen(masks: np.ndarray, shown: np.ndarray, names: tuple[str, ...] = NAMES) -> ImageMasks:
    units, there = np.flatnonzero(masks.any(axis=(1, 2))), np.flatnonzero(shown.any(axis=(1, 2)))
    return ImageMasks(
        [names[c] for c in there], pack_words(shown[there]), units, pack_words(masks[units]), int(np.prod(SIZE))
    )


def counted(images: list[ImageMasks]) -> ConceptCounts:
    state = ConceptCounts(UNITS)
    for image in images:
        state.update(image)
    return state


def same(left: ConceptCounts, right: ConceptCounts) -> bool:
    return left.to_table().equals(right.to_table(), check_metadata=True)


def test_counts_equal_a_dense_computation():
    masks, shown, images = random_images(40)
    state = counted(images)
    names, sizes, both = state.result()
    assert names == NAMES and state.positions == 40 * 35 and state.images == 40
    np.testing.assert_array_equal(sizes, shown.sum(axis=(0, 2, 3)))
    np.testing.assert_array_equal(both, np.einsum("nuhw,nchw->uc", masks.astype(int), shown.astype(int)))
    union = (masks[:, :, None] | shown[:, None]).sum(axis=(0, 3, 4))
    np.testing.assert_array_equal(iou(both, state.unit[:, None], sizes), both / union)


def test_iou_is_that_of_conditional_means():
    """NetDissect's IoU by sums: E[I|c]P(c) / (E[I] + P(c) − E[I|c]P(c))."""
    images = random_images(20)[2]
    state = counted(images)
    _, sizes, both = state.result()
    mean, share = state.unit[:, None] / state.positions, sizes / state.positions
    given_c = both / sizes
    np.testing.assert_allclose(
        iou(both, state.unit[:, None], sizes), given_c * share / (mean + share - given_c * share)
    )


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=3))
def test_any_split_and_order_is_one_pass(order: list[int], cuts: list[int]):
    images = random_images(12)[2]
    parts = [images[i] for i in order]
    edges = [0, *sorted(cuts), 12]
    state = ConceptCounts(UNITS)
    for start, stop in itertools.pairwise(edges):
        state.merge(ConceptCounts.from_table(counted(parts[start:stop]).to_table()))
    assert same(state, counted(images))


def test_counts_of_other_units_do_not_merge():
    with pytest.raises(ValueError, match="5 and of 4 units"):
        ConceptCounts(5).merge(ConceptCounts(4))


def test_words_pack_and_count_bits():
    masks = np.random.default_rng(1).random((9, 11, 13)) < 0.5
    words = pack_words(masks)
    assert words.dtype == np.uint64 and words.shape == (9, 3)
    np.testing.assert_array_equal(np.unpackbits(words.view(np.uint8), axis=1, count=11 * 13), masks.reshape(9, -1))
    np.testing.assert_array_equal(areas(words), masks.sum(axis=(1, 2)))
    np.testing.assert_array_equal(concepts._swar(words), concepts.popcount(words))
    flat = masks.reshape(9, -1).astype(int)
    np.testing.assert_array_equal(shared(words, words[:4]), flat @ flat[:4].T)


def test_products_larger_than_their_memory_are_cut(monkeypatch):
    words = pack_words(np.random.default_rng(2).random((9, 70)) < 0.5)
    whole = shared(words, words)
    monkeypatch.setattr(concepts, "_WORDS", 7)
    np.testing.assert_array_equal(shared(words, words), whole)


VIEWS = (
    View(24, 16, "nearest"),
    View((20, 30), None, "nearest"),
    View((20, 30), 18, "nearest"),
    View(None, 40, "nearest"),
    View(None, 21, "nearest"),
)
CASES = [(view, turned) for view in VIEWS for turned in (False, True)] + [
    (View(None, None, "nearest", (33, 47)), False)
]


@pytest.mark.parametrize(("view", "turned"), CASES, ids=lambda case: getattr(case, "key", case))
def test_maps_follow_the_view(view, turned):
    """What the view itself shows of an image of labels."""
    labels = np.kron(np.random.default_rng(3).integers(1, 6, (11, 16)), np.ones((3, 3), int))[:, :47]
    labels = labels.T if turned else labels
    image = Image.fromarray(np.repeat(labels[..., None].astype(np.uint8), 3, axis=2))
    maps = sample({str(n): labels == n for n in range(1, 6)}, view, view.shape)
    found = sum(int(name) * shown.astype(int) for name, shown in maps.items())
    np.testing.assert_array_equal(found, view(image)[..., 0])


def test_a_coarse_grid_takes_the_middle_of_its_cells():
    shown = np.zeros((8, 8), bool)
    shown[2:4, 6:] = True
    found = sample({"a": shown, "b": ~shown & False}, View(8, 8), (4, 4))
    assert list(found) == ["a"]
    np.testing.assert_array_equal(np.argwhere(found["a"]), [[1, 3]])


def test_a_grid_that_does_not_divide_the_view_lies_evenly_over_it():
    size = grid_size((300, 400))
    assert size == (60, 80)
    for view, cells in ((View((299, 230), None, "nearest"), grid_size((299, 230))), (View((300, 400), None), size)):
        height, width = view.shape
        maps = {f"row {row}": np.eye(height, dtype=bool)[:, [row]].repeat(width, axis=1) for row in range(height)}
        found = sample(maps, view, cells)
        for number in range(cells[0]):
            (seen,) = [name for name, shown in found.items() if shown[number].any()]
            assert seen == f"row {int((number + 0.5) * height / cells[0])}"


def test_grids_of_views():
    assert grid_size((224, 224)) == (56, 56)
    assert grid_size((64, 64)) == (64, 64)
    assert grid_size((299, 299)) == (59, 59)
    assert grid_size((24, 24)) == (24, 24)
