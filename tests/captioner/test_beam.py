import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.captioner.beam import beam_search
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig, decode_forced, decode_stepwise
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.errors import MilanError


def plain_search(
    decoder: Decoder, features: torch.Tensor, beam_size: int, length: int, lm: LanguageModel | None
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """AllenNLP's search as the reference uses it, a hypothesis at a time, every prefix decoded from scratch."""
    ids, lowest = decoder.config.ids, torch.finfo(torch.float32).min

    def after(unit: int, tokens: list[int]) -> list[float]:
        if tokens and tokens[-1] == ids.stop:
            return [0.0 if token == ids.stop else lowest for token in range(ids.total)]
        prefix = torch.tensor([[*tokens, 0]])
        return decode_forced(decoder, features[unit : unit + 1], prefix, lm).log_probs[0, -1].tolist()

    def best(beams: list[tuple[list[int], float]]) -> list[tuple[list[int], float]]:
        return sorted(beams, key=lambda beam: -beam[1])[:beam_size]

    batch: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in features]
    for step in range(length):
        if step and all(tokens[-1] == ids.stop for beams in batch for tokens, _ in beams):
            break
        for unit, beams in enumerate(batch):
            nodes = []
            for tokens, score in beams:
                grown = [([*tokens, token], score + value) for token, value in enumerate(after(unit, tokens))]
                nodes += best(grown)
            batch[unit] = best(nodes)
    return [[tokens for tokens, _ in beams] for beams in batch], [[score for _, score in beams] for beams in batch]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    words=st.integers(0, 8),
    beam_size=st.integers(1, 12),
    length=st.integers(1, 5),
    units=st.integers(1, 4),
    stop_bias=st.sampled_from([-2.0, 0.0, 2.0, 6.0]),
    mi=st.booleans(),
    seed=st.integers(0, 9),
)
def test_beam_any_decoder_equals_the_plain_search(
    words: int, beam_size: int, length: int, units: int, stop_bias: float, mi: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(words, feature_size=4, embedding_size=3, hidden_size=5)).eval()
    lm = LanguageModel(LMConfig(words, embedding_size=3, hidden_size=5)).eval() if mi else None
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
        decoder.output[1].get_parameter("bias")[decoder.config.ids.stop] += stop_bias
    features = torch.randn(units, 2, 4)
    if beam_size > decoder.config.ids.total:
        with pytest.raises(MilanError, match="does not fit a vocabulary"):
            beam_search(decoder, features, beam_size, length, lm)
        return
    tokens, scores = plain_search(decoder, features, beam_size, length, lm)
    searches = [beam_search(decoder, features, beam_size, length, lm, skip=skip) for skip in (True, False)]
    for ours in searches:
        assert ours.tokens.tolist() == tokens  # as long as the longest of the batch, padded with <stop>
        np.testing.assert_allclose(ours.scores, scores, rtol=0, atol=1e-4)
    assert searches[0].steps.tolist() == searches[1].steps.tolist()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(count=st.integers(1, 9), width=st.integers(0, 5), seed=st.integers(0, 9))
def test_language_model_scores_sequences_alike_with_and_without_shared_prefixes(
    count: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lm = LanguageModel(LMConfig(3, embedding_size=3, hidden_size=5)).eval()
    tokens, lengths = torch.randint(lm.config.ids.total, (count, width)), torch.randint(width + 1, (count,))
    with torch.no_grad():
        inputs = torch.cat([torch.full((count, 1), lm.config.ids.start), tokens], dim=1)
        each = lm(inputs)[:, :-1].gather(2, tokens[..., None])[..., 0]
    expected = each.masked_fill(torch.arange(width) >= lengths[:, None], 0).sum(dim=1)
    for skip in (True, False):
        torch.testing.assert_close(lm.sequence_logp(tokens, lengths, skip), expected, atol=1e-5, rtol=0)


def test_beam_tiny_decoder_some_beams_finish_and_some_run_out_of_room(
    tiny: Captioner, tiny_features: torch.Tensor
) -> None:
    beams = beam_search(tiny.decoder, tiny_features, 5, 6)
    stopped = beams.tokens == tiny.indexer.ids.stop
    assert 0 < stopped.any(2).float().mean() < 1
    assert beams.steps.tolist() == [6 if not unit.any(1).all() else int((~unit).sum(1).max()) + 1 for unit in stopped]


def test_beam_whole_vocabulary_finds_the_best_of_all_pairs(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    ids = tiny.indexer.ids
    pairs = [p for p in itertools.product(range(ids.total), repeat=2) if p[0] != ids.stop or p[1] == ids.stop]
    beams = beam_search(tiny.decoder, tiny_features[:1], ids.total, length=2)
    targets = torch.tensor(pairs)
    log_probs = decode_forced(tiny.decoder, tiny_features[:1].expand(len(pairs), -1, -1), targets).log_probs
    each = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    each[targets[:, 0] == ids.stop, 1] = 0
    assert beams.scores[0].tolist() == pytest.approx(each.sum(1).topk(ids.total).values.tolist(), abs=1e-5)


def test_beam_of_one_follows_greedy_until_stop(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    beams = beam_search(tiny.decoder, tiny_features, 1, 6)
    greedy = decode_stepwise(tiny.decoder, tiny_features, 6).tokens
    assert [tiny.indexer.reconstruct(row) for row in beams.tokens[:, 0].tolist()] == [
        tiny.indexer.reconstruct(row) for row in greedy.tolist()
    ]


def test_beam_any_batch_composition_same_result(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    together = tiny.candidates(tiny_features)
    for unit in range(len(tiny_features)):
        alone = tiny.candidates(tiny_features[unit : unit + 1])
        assert alone.tokens[0] == together.tokens[unit]
        assert alone.logp_d_given_e[0].tolist() == pytest.approx(together.logp_d_given_e[unit].tolist(), abs=1e-5)
        assert alone.logp_d is not None and together.logp_d is not None
        assert alone.logp_d[0].tolist() == pytest.approx(together.logp_d[unit].tolist(), abs=1e-5)


def test_beam_all_finished_search_stops_early(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    with torch.no_grad():
        tiny.decoder.output[1].get_parameter("bias")[tiny.indexer.ids.stop] = 50.0
    beams = beam_search(tiny.decoder, tiny_features, 1, 6)
    assert beams.tokens.tolist() == [[[tiny.indexer.ids.stop]]] * len(tiny_features)
    assert beams.steps.tolist() == [1] * len(tiny_features)


def test_beam_no_units_returns_nothing(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    assert tiny.describe(tiny_features[:0]) == []


@pytest.mark.parametrize("beam_size", [0, 14])
def test_beam_wider_than_the_vocabulary_says_what_fits(
    tiny: Captioner, tiny_features: torch.Tensor, beam_size: int
) -> None:
    with pytest.raises(MilanError, match=r"beam of \d+ .* 13 tokens; set the beam size to 1…13"):
        tiny.candidates(tiny_features, beam_size=beam_size)


def test_beam_without_room_for_a_token_says_so(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    with pytest.raises(MilanError, match="set the length to 1 or more"):
        tiny.candidates(tiny_features, length=0)
