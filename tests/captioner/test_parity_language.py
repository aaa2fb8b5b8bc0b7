import json
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.captioner.beam import beam_search
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import load_reference_lm
from milan_ray.captioner.decoder import Decoded, decode_forced, decode_stepwise
from milan_ray.captioner.quirks import REFERENCE
from milan_ray.captioner.rerank import counted_length


def assert_close(ours: torch.Tensor | np.ndarray, reference: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), reference, rtol=0, atol=1e-4)


def assert_decoded_close(ours: Decoded, arrays: dict[str, np.ndarray], run: str) -> None:
    assert_close(ours.scores, arrays[f"{run}.scores"])
    assert_close(ours.log_probs, arrays[f"{run}.predictions"])
    assert_close(ours.attentions, arrays[f"{run}.attentions"])


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "language/decode_goldens.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def runs(golden: Path) -> dict:
    return json.loads((golden / "language/decode_goldens.json").read_text())


@pytest.fixture(scope="module")
def features(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(arrays["features"])


def test_language_model_golden_captions_logprobs_and_sums_agree(golden: Path) -> None:
    indexer, lm = load_reference_lm(golden / "language/lm.pth")
    captions = json.loads((golden / "language/lm_captions.json").read_text())
    with np.load(golden / "language/lm_goldens.npz") as reference:
        inputs = torch.tensor(indexer.index(captions))
        assert inputs.tolist() == reference["inputs"].tolist()
        lm.eval()
        with torch.no_grad():
            assert_close(lm(inputs), reference["logprobs"])
        targets = inputs[:, 1:]
        steps = torch.full((len(targets),), targets.shape[1])
        lengths = counted_length(targets, indexer.ids.stop, steps, REFERENCE)
        assert_close(lm.sequence_logp(targets, lengths), reference["reduced"])
        assert_close(lm.sequence_logp(targets, lengths), reference["logp"])


@pytest.mark.parametrize("mi", [False, True])
def test_decoder_golden_teacher_forcing_agrees(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, mi: bool
) -> None:
    targets = torch.tensor(toy.indexer.index(runs["forced_captions"], start=False))
    assert targets.tolist() == arrays["forced_targets"].tolist()
    decoded = decode_forced(toy.decoder, features, targets, toy.lm if mi else None)
    assert_decoded_close(decoded, arrays, f"forced_mi{int(mi)}")


@pytest.mark.parametrize("name", ["greedy", "greedy_mi"])
def test_decoder_golden_greedy_agrees(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, name: str
) -> None:
    decoded = decode_stepwise(toy.decoder, features, 15, toy.lm if runs[name]["kwargs"]["mi"] else None)
    assert decoded.tokens.tolist() == arrays[f"{name}.tokens"].tolist()
    assert_decoded_close(decoded, arrays, name)
    assert [toy.indexer.reconstruct(row) for row in decoded.tokens.tolist()] == runs[name]["captions"]


def test_decoder_golden_first_step_states_agree(toy: Captioner, arrays: dict, features: torch.Tensor) -> None:
    decoder = toy.decoder
    with torch.no_grad():
        h, c = decoder.initial_state(features)
        assert_close(h, arrays["step0.h0"])
        assert_close(c, arrays["step0.c0"])
        gates = decoder.token_gates()[[toy.indexer.ids.start] * len(features)]
        keys = decoder.attend.key_to_hidden(features)
        h, c, weights = decoder.step(features, keys, h, c, gates, decoder.input_weights()[1])
        lm_log_probs, (lm_h, lm_c) = toy.lm.step(torch.full((len(features),), toy.indexer.ids.start))
        predictions = decoder.output(h) - 0.2 * lm_log_probs
    for name, ours in (
        ("h1", h),
        ("c1", c),
        ("attentions", weights),
        ("predictions", predictions),
        ("h_lm1", lm_h),
        ("c_lm1", lm_c),
    ):
        assert_close(ours, arrays[f"step0.{name}"])


@pytest.mark.parametrize("name", ["beam", "beam_mi", "beam1"])
def test_beam_golden_tokens_identical_and_scores_agree(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, name: str
) -> None:
    kwargs = runs[name]["kwargs"]
    lm = toy.lm if kwargs["mi"] else None
    beams = beam_search(toy.decoder, features, kwargs.get("beam_size", 50), 15, lm, kwargs.get("temperature", 0.2))
    assert beams.tokens.tolist() == arrays[f"{name}.beam_tokens"].tolist()
    assert_close(beams.scores, arrays[f"{name}.beam_scores"])
    texts = [[toy.indexer.reconstruct(row) for row in rows] for rows in beams.tokens.tolist()]
    assert texts == runs[name]["beam_captions"]


@pytest.mark.parametrize("name", ["rerank", "default"])
def test_rerank_golden_captions_identical_and_scores_agree(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, name: str
) -> None:
    best = [unit[0] for unit in toy.describe(features, quirks=REFERENCE)]
    assert [one.text for one in best] == runs[name]["captions"]
    assert_close(np.array([one.score for one in best]), arrays[f"{name}.scores"])


def test_rerank_without_quirks_intended_mask_changes_the_known_rows(
    golden: Path, toy: Captioner, runs: dict, features: torch.Tensor
) -> None:
    ours = [unit[0].text for unit in toy.describe(features)]
    changed = sum(a != b for a, b in zip(ours, runs["rerank"]["captions"], strict=True))
    assert changed == json.loads((golden / "verify.json").read_text())["rerank_rows_changed_by_intended_mask"]


def test_rerank_golden_whole_dataset_captions_identical(golden: Path, toy: Captioner, runs: dict) -> None:
    with np.load(golden / "language/features_shapes.npz") as file:
        features = file["features"]
    ours = [d[0].text for i in range(0, 72, 16) for d in toy.describe(features[i : i + 16], quirks=REFERENCE)]
    assert ours == runs["predict_features_default"]


@pytest.mark.parametrize("mi", [False, True])
def test_score_golden_captions_agree(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, mi: bool
) -> None:
    captions = runs["forced_captions"]
    assert_close(toy.score(captions, features, mi=mi), arrays[f"score_mi{int(mi)}"])
    assert_close(toy.score(captions, features[:1], mi=mi), arrays[f"score_single_mi{int(mi)}"])
    assert_close(toy.score(captions, features), arrays["score_default"])
