"""CLIP-Dissect's arithmetic against loops over units and concepts, in any pieces and order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.errors import MilanError
from milan_ray.labelers.clip_dissect import (
    WPMI,
    Best,
    ClipDissect,
    Cosines,
    LogSumExp,
    pointwise,
    rank_reorder,
    read_concepts,
)

IMAGES, UNITS, CONCEPTS = 150, 6, 23


@pytest.fixture(scope="module")
def probe() -> tuple[np.ndarray, np.ndarray]:
    """P (images × concepts), A (images × units)."""
    rng = np.random.default_rng(0)
    fit = rng.normal(0.2, 0.1, (IMAGES, CONCEPTS))
    activations = rng.normal(size=(IMAGES, UNITS)) + 4 * fit[:, :UNITS]
    return fit, activations


def best_images(activations: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.argsort(-activations[:, unit], kind="stable")[:count] for unit in range(UNITS)])


def dense_wpmi(fit: np.ndarray, activations: np.ndarray, name: str) -> np.ndarray:
    """The formulas of CLIP-Dissect's published code, one line each."""
    k, a, lam = {"soft_wpmi": (100, 10, 1.0), "wpmi": (28, 2, 0.6)}[name]
    p = np.exp(a * fit)
    p = p / p.sum(axis=1, keepdims=True)
    s = np.zeros((UNITS, CONCEPTS))
    for unit in range(UNITS):
        for j, image in enumerate(best_images(activations, k)[unit]):
            w = 0.998 - j / k * (0.998 - 0.97)
            s[unit] += np.log(1 + w * (p[image] - 1) + 1e-7) if name == "soft_wpmi" else np.log(p[image] + 1e-7)
    prior = np.log(np.exp(s - s.max(axis=0)).sum(axis=0)) + s.max(axis=0) - math.log(UNITS)
    return s - lam * prior


@pytest.mark.parametrize("name", ["soft_wpmi", "wpmi"])
def test_mutual_information_by_chunks_equals_a_dense_computation(probe, name):
    fit, activations = probe
    rows = torch.from_numpy(best_images(activations, WPMI[name].top_k))
    state = LogSumExp()
    for start in range(0, CONCEPTS, 7):
        state.update(f"{start}", WPMI[name].a * fit[:, start : start + 7])
    normalisers = torch.from_numpy(state.result())
    found = [
        pointwise(torch.from_numpy(fit[:, start : start + 5]), normalisers, rows, WPMI[name])
        for start in range(0, CONCEPTS, 5)
    ]
    np.testing.assert_allclose(torch.cat(found, dim=1), dense_wpmi(fit, activations, name), rtol=1e-9)


def test_units_with_fewer_images_take_what_they_have(probe):
    fit, activations = probe
    rows = torch.from_numpy(best_images(activations, 5))
    short = rows.clone()
    short[2, 3:] = -1
    sums = torch.from_numpy(np.log(np.exp(10 * fit).sum(axis=1)))
    how = WPMI["soft_wpmi"]
    whole, cut = (pointwise(torch.from_numpy(fit), sums, own, how) for own in (rows, short))
    assert not torch.equal(whole[2], cut[2]) and torch.isfinite(cut).all()


def test_rank_reorder_equals_loops(probe):
    fit, activations = probe
    rows = best_images(activations, 30)
    values = np.take_along_axis(activations, rows.T, axis=0).T
    found = rank_reorder(torch.from_numpy(fit), torch.from_numpy(rows), torch.from_numpy(values)).numpy()
    for unit in range(UNITS):
        rng = np.random.default_rng(0)
        act = activations[rows[unit], unit]
        usual = np.mean([np.mean(np.abs(act - act[rng.permutation(30)]) ** 3) for _ in range(5)])
        for concept in range(CONCEPTS):
            near = fit[rows[unit], concept]
            place = np.empty(30, int)
            place[np.argsort(-near, kind="stable")] = np.arange(30)
            error = np.mean(np.abs(act - np.sort(act)[::-1][place]) ** 3)
            assert found[unit, concept] == pytest.approx(-error / usual / max(near.mean(), 1e-3) ** 0.5)


@pytest.mark.parametrize("power", [1, 3])
def test_cosines_by_pieces_equal_a_dense_computation(probe, power):
    fit, activations = (torch.from_numpy(values) for values in probe)
    state = Cosines(activations.mean(dim=0), fit.mean(dim=0), power)
    for start in range(0, IMAGES, 40):
        state.update(activations[start : start + 40], fit[start : start + 40])
    own, near = ((values - values.mean(dim=0)) ** power for values in (activations, fit))
    expected = (own / own.norm(dim=0)).T @ (near / near.norm(dim=0).clamp(min=1e-3))
    np.testing.assert_allclose(state.result(), expected, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_log_sum_exp_is_the_same_for_any_split_order_and_repetition(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    names = [f"{n:03d}" for n in range(data.draw(st.integers(1, 8)))]
    scale = data.draw(st.sampled_from([1.0, 1e-6, 1e3]))
    pieces = {name: rng.normal(0, scale, (3, data.draw(st.integers(1, 5)))) for name in names}
    once = LogSumExp()
    for name in names:
        once.update(name, pieces[name])
    order = [*names, *data.draw(st.lists(st.sampled_from(names)))]
    random.Random(data.draw(st.integers(0, 99))).shuffle(order)
    states = [LogSumExp() for _ in range(data.draw(st.integers(1, 3)))]
    for number, name in enumerate(order):
        states[number % len(states)].update(name, pieces[name])
    merged = LogSumExp.from_table(states[0].to_table())
    for state in reversed(states):
        merged.merge(state)
    np.testing.assert_array_equal(merged.result(), once.result())
    terms = np.concatenate(list(pieces.values()), axis=1)
    np.testing.assert_allclose(once.result(), np.logaddexp.reduce(terms, axis=1))


def test_best_of_chunks_is_the_best_of_all_with_ties_in_the_lists_order():
    similarities = np.array([[0.5, 0.9, 0.5, 0.9, 0.1, 0.9], [3, 2, 1, 0, -1, -2]], float)
    chunks = [Best.of(similarities[:, start : start + 2], start, 3) for start in (4, 0, 2)]
    merged = Best.merged(chunks, 3)
    assert merged.concepts.tolist() == [[1, 3, 5], [0, 1, 2]]
    labels = merged.labels(list("abcdef"), np.array([True, False]), "none")
    assert [label.text for label in labels[0]] == ["b", "d", "f"]
    assert [(label.text, label.score) for label in labels[1]] == [("none", 0.0)]


def test_blank_lines_and_repetitions_shift_no_label():
    assert read_concepts("\n red \n\n\nblue house\nred\n \n") == ("red", "blue house")
    with pytest.raises(MilanError, match="list of concepts is empty"):
        read_concepts("\n \n")


def test_identity_tells_lists_and_similarities_apart():
    one = ClipDissect(("a", "b"))
    assert one.lam == 1.0 and ClipDissect(("a",), "cos_similarity").lam is None
    others = [ClipDissect(("b", "a")), ClipDissect(("a", "b"), "wpmi"), ClipDissect(("a", "b"), pooling="max")]
    assert all(other.identity() != one.identity() for other in others)
    with pytest.raises(MilanError, match="nearest: soft_wpmi"):
        ClipDissect(("a",), "soft_wpmy")  # type: ignore[arg-type]  # the refused name
