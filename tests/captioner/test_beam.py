import itertools

import pytest
import torch

from milan_ray.captioner.beam import beam_search
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, decode_forced, decode_stepwise
from milan_ray.captioner.lm import LanguageModel
from milan_ray.errors import MilanError


def naive_beam(
    decoder: Decoder, features: torch.Tensor, beam_size: int, length: int, lm: LanguageModel | None
) -> list[tuple[list[int], float]]:
    """One unit's beam, a hypothesis at a time, every prefix decoded from scratch."""
    stop = decoder.config.ids.stop
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(length):
        if all(tokens and tokens[-1] == stop for tokens, _ in beams):
            break
        grown = []
        for tokens, score in beams:
            if tokens and tokens[-1] == stop:
                grown.append(([*tokens, stop], score))
                continue
            prefix = torch.tensor([[*tokens, 0]])
            last = decode_forced(decoder, features[None], prefix, lm).log_probs[0, -1]
            grown += [([*tokens, token], score + value) for token, value in enumerate(last.tolist())]
        beams = sorted(grown, key=lambda beam: -beam[1])[:beam_size]
    return beams


@pytest.mark.parametrize("mi", [False, True])
@pytest.mark.parametrize("beam_size", [1, 2, 5, 13])
def test_beam_random_decoder_equals_the_naive_search(
    tiny: Captioner, tiny_features: torch.Tensor, beam_size: int, mi: bool
) -> None:
    lm = tiny.lm if mi else None
    beams = beam_search(tiny.decoder, tiny_features, beam_size, 6, lm)
    stop = tiny.indexer.ids.stop
    if beam_size == 5:  # the case is worth something: some beams finish, some do not
        assert 0 < (beams.tokens == stop).any(2).float().mean() < 1
    for unit, features in enumerate(tiny_features):
        naive = naive_beam(tiny.decoder, features, beam_size, 6, lm)
        padded = [tokens + [stop] * (beams.tokens.shape[2] - len(tokens)) for tokens, _ in naive]
        assert beams.tokens[unit].tolist() == padded
        assert beams.scores[unit].tolist() == pytest.approx([score for _, score in naive], abs=1e-4)
        assert beams.steps[unit] == len(naive[0][0])


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
        tiny.decoder.output[1].bias[tiny.indexer.ids.stop] = 50.0
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
