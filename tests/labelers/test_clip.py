"""Ranking by similarity, against loops over exemplars and texts; and all of MILAN's labelers behind one protocol."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from milan_ray.labelers.clip import Clip, ClipSimilarity, query, similarity
from milan_ray.labelers.milan import LIKELIHOOD, MILAN, N_BEST, PointwiseMutualInformation, best_labels
from milan_ray.labelers.protocol import Evidence, Labeler

TEXTS = ("red house", "dogs", "dogs", "grass", "dark areas")


def unit_vectors(*shape: int) -> np.ndarray:
    found = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def candidates() -> pa.Table:
    """Two units with five candidates each; one text twice, as different tokens may read."""
    rng = np.random.default_rng(1)
    return pa.table(
        {
            "unit": [3] * 5 + [7] * 5,
            "lm": ["digest"] * 10,
            "beam_rank": [*range(5), *range(5)],
            "logp_d_given_e": -np.sort(rng.random((2, 5)), axis=1).ravel(),
            "logp_d": -10 * rng.random(10),
            "finished": [True] * 10,
            "text": TEXTS * 2,
        }
    )


@pytest.mark.parametrize("z", [0.0, 0.5, 1.0])
def test_parity_similarity_is_the_mean_over_exemplars_of_both_cosines(z: float) -> None:
    exemplars, texts = unit_vectors(2, 15, 24), unit_vectors(7, 24)
    regions, images = exemplars
    expected = [
        sum(
            (1 - z) * float(region @ text) + z * float(image @ text)
            for region, image in zip(regions, images, strict=True)
        )
        / 15
        for text in texts
    ]
    one = query(np.concatenate([regions, images], axis=1), z)
    np.testing.assert_allclose(similarity(texts, np.stack([one] * 7)), expected, atol=1e-6)


def test_similarity_of_a_row_has_the_same_bits_among_any_others() -> None:
    texts, queries = unit_vectors(301, 96), unit_vectors(301, 96)[::-1]
    together = similarity(texts, queries)
    for rows in (slice(0, 1), slice(5, 8), slice(100, 301)):
        assert np.array_equal(similarity(texts[rows], queries[rows]), together[rows])


def test_labelers_rank_every_unit_s_candidates_by_their_own_scores() -> None:
    table = candidates()
    likely, prior = table["logp_d_given_e"].to_numpy(), table["logp_d"].to_numpy()
    fits = np.random.default_rng(2).random(10).astype(np.float32)
    given: dict[str, tuple[Labeler, np.ndarray]] = {
        MILAN: (PointwiseMutualInformation(MILAN, 0.3), likely - 0.3 * prior),
        LIKELIHOOD: (PointwiseMutualInformation(LIKELIHOOD, 0.0), likely),
        "milan+clip": (ClipSimilarity(0.5, {"weights": "digest"}), fits),
    }
    for name, (labeler, scores) in given.items():
        assert labeler.name == name
        evidence = Evidence(table, fits if "similarity" in labeler.requires else None)
        labels = labeler.label(evidence)
        assert list(labels) == [3, 7]
        for start, found in zip((0, 5), labels.values(), strict=True):
            best = start + int(scores[start : start + 5].argmax())
            assert found[0].text == TEXTS[best - start]
            assert found[0].score == pytest.approx(scores[best]) and found[0].logp_d_given_e == likely[best]
            assert sorted(label.text for label in found) == sorted(set(TEXTS))
            assert [label.score for label in found] == sorted((label.score for label in found), reverse=True)


def test_labels_are_complete_and_written_as_people_write_unless_the_choice_is_the_reference_s() -> None:
    table = candidates().slice(0, 5)
    texts = pa.array(["The top of the", "people 's heads", "dogs", "cats", "and"])
    table = table.set_column(table.schema.get_field_index("text"), "text", texts)
    fits = np.array([0.9, 0.7, 0.8, 0.95, 1.0], np.float32)
    finished = pa.array([True, True, True, False, True])
    table = table.set_column(table.schema.get_field_index("finished"), "finished", finished)
    for plain, expected in (
        (False, ["dogs", "people's heads", "and", "cats", "The top of the"]),
        (True, ["and", "cats", "The top of the", "dogs", "people 's heads"]),
    ):
        labeler = ClipSimilarity(0.5, {}, plain)
        (found,) = labeler.label(Evidence(table, fits)).values()
        assert [label.text for label in found] == expected
        by_likelihood = PointwiseMutualInformation(LIKELIHOOD, 0.0, plain)
        (found,) = by_likelihood.label(Evidence(table)).values()
        assert found[0].text == ("The top of the" if plain else "people's heads")
    assert PointwiseMutualInformation(MILAN, 0.2, True).identity() == {"rescore": 1, "lam": 0.2, "n_best": N_BEST}
    assert PointwiseMutualInformation(MILAN, 0.2).identity() == {"rescore": 2, "lam": 0.2, "n_best": N_BEST}


def test_labels_without_a_language_model_have_no_log_p_d_and_ties_stay_in_beam_order() -> None:
    found = best_labels(["b", "a", "b"], np.array([1.0, 1.0, 2.0]), np.array([-1.0, -2.0, -3.0]), None)
    assert [(label.text, label.score, label.logp_d_given_e, label.logp_d) for label in found] == [
        ("b", 2.0, -3.0, None),
        ("a", 1.0, -2.0, None),
    ]


def test_identity_follows_z_and_the_model() -> None:
    same = [ClipSimilarity(0.5, {"weights": "a"}).identity() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != ClipSimilarity(0.4, {"weights": "a"}).identity()
    assert same[0] != ClipSimilarity(0.5, {"weights": "b"}).identity()
    assert Clip("/somewhere/clip-vit").name == "clip-vit"
