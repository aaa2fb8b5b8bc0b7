import json
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.captioner.captioner import Captioner, Decoding
from milan_ray.captioner.checkpoints import load_reference_lm
from milan_ray.captioner.encoder import pool_maps
from milan_ray.captioner.quirks import REFERENCE, Quirks
from milan_ray.captioner.rerank import counted_length
from milan_ray.scoring.text import bleu, rouge


def assert_close(ours: torch.Tensor | np.ndarray, reference: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), reference, rtol=0, atol=1e-4)


def assert_decoding_agrees(ours: Decoding, arrays: dict[str, np.ndarray], run: str) -> None:
    """Every array that the golden file holds of a run: token ids identical, numbers within 1e-4."""
    found = {name.removeprefix(f"{run}.") for name in arrays if name.startswith(f"{run}.")}
    beams = ours.beams
    for name, values in {
        "tokens": ours.tokens,
        "scores": ours.scores,
        "predictions": ours.log_probs,
        "attentions": ours.attentions,
        "beam_tokens": None if beams is None else beams.tokens,
        "beam_scores": None if beams is None else beams.scores,
    }.items():
        assert (values is not None) == (name in found), name
        if values is not None:
            assert_close(values, arrays[f"{run}.{name}"])


def plain_stepwise(
    toy: Captioner, features: torch.Tensor, strategy: str, lam: float, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy or sampled decoding with mutual information as the reference does it, on torch's own modules."""
    decoder, lm = toy.decoder, toy.lm
    assert lm is not None
    h, c = decoder.init_h(features.mean(1)), decoder.init_c(features.mean(1))
    token = torch.full((len(features),), toy.indexer.ids.start)
    tokens, predictions, attentions = [token], [], []
    for _ in range(length):
        hidden = decoder.attend.query_to_hidden(h)[:, None] + decoder.attend.key_to_hidden(features)
        weights = decoder.attend.output[0](torch.tanh(hidden)).softmax(1)
        context = (weights * features).sum(1) * decoder.feature_gate(h)
        h, c = decoder.lstm(torch.cat([decoder.embedding(token), context], dim=1), (h, c))
        prediction = decoder.output(h) - lam * lm(torch.stack(tokens, 1))[:, -1]
        if strategy == "greedy":
            token = prediction.argmax(1)
        else:
            token = torch.stack([torch.distributions.Categorical(probs=row.exp()).sample() for row in prediction])
        tokens.append(token)
        predictions.append(prediction.detach())
        attentions.append(weights.detach().squeeze(2))
    return torch.stack(tokens[1:], 1), torch.stack(predictions, 1), torch.stack(attentions, 1)


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


@pytest.mark.parametrize("run", ["greedy", "greedy_mi", "beam", "beam_mi", "beam1", "rerank", "default"])
def test_decode_golden_run_every_array_and_caption_agrees(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, run: str
) -> None:
    options = dict(runs[run]["kwargs"])
    if "temperature" in options:
        options["lam"] = options.pop("temperature")
    ours = toy.decode(features, quirks=REFERENCE, **options)
    assert_decoding_agrees(ours, arrays, run)
    assert ours.texts == runs[run]["captions"]
    assert ours.beam_texts == runs[run]["beam_captions"]


@pytest.mark.parametrize("mi", [False, True])
def test_decode_golden_teacher_forcing_agrees(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, mi: bool
) -> None:
    targets = torch.tensor(toy.indexer.index(runs["forced_captions"], start=False))
    assert targets.tolist() == arrays["forced_targets"].tolist()
    run = f"forced_mi{int(mi)}"
    ours = toy.decode(features, targets, mi=mi)
    for name, values in (("predictions", ours.log_probs), ("attentions", ours.attentions), ("scores", ours.scores)):
        assert values is not None
        assert_close(values, arrays[f"{run}.{name}"])
    if mi:  # as in the reference, mutual information is the default where there is a language model
        assert torch.equal(toy.decode(features, targets).scores, ours.scores)


@pytest.mark.parametrize(("strategy", "lam"), [("greedy", 0.5), ("sample", 0.2), ("sample", 0.7)])
def test_decode_stepwise_any_lam_equals_plain_modules_step_by_step(
    toy: Captioner, features: torch.Tensor, strategy: str, lam: float
) -> None:
    torch.manual_seed(3)
    ours = toy.decode(features, strategy, lam=lam, length=8)
    torch.manual_seed(3)
    tokens, predictions, attentions = plain_stepwise(toy, features, strategy, lam, length=8)
    assert ours.tokens.tolist() == tokens.tolist()
    assert ours.log_probs is not None and ours.attentions is not None
    assert_close(ours.log_probs, predictions.numpy())
    assert_close(ours.attentions, attentions.numpy())
    assert_close(ours.scores, predictions.gather(2, tokens.unsqueeze(2)).sum((1, 2)).numpy())


def test_decoder_golden_first_step_states_agree(toy: Captioner, arrays: dict, features: torch.Tensor) -> None:
    decoder = toy.decoder
    assert toy.lm is not None
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


@pytest.mark.parametrize("lam", [0.05, 0.2, 1.0])
def test_rerank_golden_beam_any_lam_equals_the_plain_language_model(
    toy: Captioner, arrays: dict, features: torch.Tensor, lam: float
) -> None:
    assert toy.lm is not None
    tokens = torch.from_numpy(arrays["rerank.beam_tokens"])
    inputs = torch.nn.functional.pad(tokens.flatten(0, 1), (1, 0), value=toy.indexer.ids.start)
    counts = torch.ones_like(inputs[:, 1:])
    for row, position in (inputs == toy.indexer.ids.stop).nonzero():
        counts[row, position + 1 :] = 0  # one further than meant, as targets begin one earlier than inputs
    with torch.no_grad():
        each = toy.lm(inputs)[:, :-1].gather(2, inputs[:, 1:, None]).squeeze(2)
    expected = arrays["rerank.beam_scores"] - lam * (each * counts).sum(1).view(tokens.shape[:2]).numpy()
    ours = toy.decode(features, "rerank", lam=lam, quirks=REFERENCE)
    assert_close(ours.scores, expected.max(axis=1))
    assert ours.tokens.tolist() == tokens[torch.arange(len(tokens)), expected.argmax(axis=1)].tolist()


@pytest.mark.parametrize(
    ("quirks", "other_captions", "other_scores"),
    [
        (REFERENCE, 0, 0),
        (Quirks(lm_counts_past_stop=True), 0, 1),
        (Quirks(batch_dependent_length=True), 2, 12),
        (Quirks(), 2, 12),
    ],
)
def test_rerank_golden_needs_both_quirks(
    golden: Path,
    toy: Captioner,
    arrays: dict,
    features: torch.Tensor,
    quirks: Quirks,
    other_captions: int,
    other_scores: int,
) -> None:
    ours = toy.decode(features, quirks=quirks)
    assert (ours.tokens.numpy() != arrays["rerank.tokens"]).any(axis=1).sum() == other_captions
    assert (np.abs(ours.scores.numpy() - arrays["rerank.scores"]) > 1e-4).sum() == other_scores
    if quirks == Quirks():
        record = json.loads((golden / "verify.json").read_text())
        assert record["rerank_rows_changed_by_intended_mask"] == other_captions


def test_describe_golden_captions_and_scores_are_those_of_decode(toy: Captioner, features: torch.Tensor) -> None:
    best = [unit[0] for unit in toy.describe(features, quirks=REFERENCE)]
    decoded = toy.decode(features, quirks=REFERENCE)
    assert [one.text for one in best] == decoded.texts
    assert_close(np.array([one.score for one in best]), decoded.scores.numpy())


def test_predict_golden_dataset_from_features_captions_identical(golden: Path, toy: Captioner, runs: dict) -> None:
    with np.load(golden / "language/features_shapes.npz") as file:
        features = torch.from_numpy(file["features"])
    texts = [text for batch in features.split(16) for text in toy.decode(batch, quirks=REFERENCE).texts]
    assert texts == runs["predict_features_default"]


def test_predict_golden_first_batch_from_images_features_and_captions_agree(
    golden: Path, toy: Captioner, runs: dict
) -> None:
    folder, encoder, pooled = golden / "milannotations/toy/shapes/conv1", toy.encoder(), []
    for images, masks in zip(np.load(folder / "images.npy"), np.load(folder / "masks.npy"), strict=True):
        maps = encoder.maps(torch.from_numpy(images).float() * torch.tensor(1 / 255))
        pooled.append(pool_maps(maps, torch.from_numpy(masks[:, 0]), torch.arange(len(images))))
    features = torch.stack(pooled)
    with np.load(golden / "language/features_shapes.npz") as file:
        assert_close(features, file["features"][:16])
    assert toy.decode(features, quirks=REFERENCE).texts == runs["predict_rerank_dataset"][:16]


@pytest.mark.parametrize("mi", [False, True])
def test_score_golden_captions_agree(
    toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor, mi: bool
) -> None:
    captions = runs["forced_captions"]
    assert_close(toy.score(captions, features, mi=mi), arrays[f"score_mi{int(mi)}"])
    assert_close(toy.score(captions, features[:1], mi=mi), arrays[f"score_single_mi{int(mi)}"])
    assert_close(toy.score(captions, features), arrays["score_default"])


def test_score_golden_is_linear_in_lam(toy: Captioner, arrays: dict, runs: dict, features: torch.Tensor) -> None:
    plain, mutual = arrays["score_mi0"], arrays["score_mi1"]
    expected = plain + (mutual - plain) / 0.2 * 0.5
    np.testing.assert_allclose(toy.score(runs["forced_captions"], features, lam=0.5), expected, rtol=0, atol=3e-4)


def test_predict_golden_dataset_bleu_and_rouge_agree(golden: Path, runs: dict) -> None:
    units = json.loads((golden / "milannotations/loaded_annotation_count3.json").read_text())["samples"]
    annotations = [unit["annotations"] for unit in units]
    ours, theirs = bleu(runs["predict_rerank_dataset"], annotations), runs["bleu"]
    assert (ours.score, ours.bp) == pytest.approx((theirs["score"], theirs["bp"]))
    assert (ours.counts, ours.totals) == (theirs["counts"], theirs["totals"])
    expected = {f"{name}-{part}": value for name, parts in runs["rouge"].items() for part, value in parts.items()}
    assert rouge(runs["predict_rerank_dataset"], annotations) == pytest.approx(expected)
