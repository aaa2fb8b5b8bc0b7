"""What the beam search leaves out changes nothing, and is really left out."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from milan_ray.benchmarks.plain_search import plain_rerank
from milan_ray.captioner.beam import Beams, beam_search, largest
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.products import Product
from milan_ray.captioner.rerank import beam_logp

UNITS, EXEMPLARS, FEATURES, HIDDEN, WORDS = 5, 4, 24, 16, 40

Rows = dict[tuple[int, int], list[int]]


def captioner(stop_bias: float, seed: int = 0) -> tuple[Decoder, LanguageModel, torch.Tensor]:
    """A decoder, a language model, and features of some units; a bias makes beams finish."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(WORDS, FEATURES, embedding_size=8, hidden_size=HIDDEN)).eval()
    lm = LanguageModel(LMConfig(WORDS, embedding_size=8, hidden_size=HIDDEN)).eval()
    with torch.no_grad():
        for parameter in [*decoder.parameters(), *lm.parameters()]:
            parameter.mul_(4)
        decoder.output[1].get_parameter("bias")[decoder.config.ids.stop] += stop_bias
    return decoder, lm, torch.randn(UNITS, EXEMPLARS, FEATURES)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """(size of a row, size of its product) → how many rows every matrix product of a search gets."""
    seen: Rows = defaultdict(list)
    product = Product.__call__

    def watched(self: Product, x: torch.Tensor) -> torch.Tensor:
        result = product(self, x)
        seen[x.shape[1], result.shape[1]].append(len(x))
        return result

    monkeypatch.setattr(Product, "__call__", watched)
    return seen


def prefixes(beams: Beams, stop: int, length: int) -> set[tuple[int, ...]]:
    """The distinct (unit, beginnings of so many tokens) among the beams that are not finished by then."""
    found = set()
    for unit, rows in enumerate(beams.tokens.tolist()):
        found |= {(unit, *row[:length]) for row in rows if stop not in row[:length]}
    return found


@pytest.mark.parametrize("stop_bias", [-20.0, 0.0, 4.0, 9.0])
@pytest.mark.parametrize("beam_size", [1, 7, 44])
def test_beam_and_rerank_equal_the_plain_search_and_reading_every_beam(stop_bias: float, beam_size: int) -> None:
    decoder, lm, features = captioner(stop_bias)
    plain = plain_rerank(decoder, lm, features, beam_size, length=7)
    beams = beam_search(decoder, features, beam_size, length=7)
    assert beams.tokens.tolist() == plain.tokens.tolist()
    torch.testing.assert_close(beams.scores, plain.logp_d_given_e, atol=1e-4, rtol=0)
    torch.testing.assert_close(beam_logp(lm, beams), plain.logp_d, atol=1e-4, rtol=0)


def test_beam_attention_keys_are_projected_once_and_finished_beams_leave(rows: Rows) -> None:
    decoder, _, features = captioner(stop_bias=4.0)
    beam_search(decoder, features, beam_size=20, length=8)
    assert rows[FEATURES, HIDDEN] == [UNITS * EXEMPLARS]
    outputs = rows[HIDDEN, decoder.config.ids.total].copy()
    before = beam_search(decoder, features, beam_size=20, length=4)
    running = int((before.tokens[..., -1] != decoder.config.ids.stop).sum())
    assert outputs[0] == UNITS and outputs[4] == running < 20 * UNITS


def test_beam_state_work_is_done_once_per_parent_not_per_beam(rows: Rows) -> None:
    decoder, _, features = captioner(stop_bias=-20.0)
    beam_search(decoder, features, beam_size=20, length=3)
    gates = rows[HIDDEN, FEATURES].copy()
    two = beam_search(decoder, features, beam_size=20, length=2)
    # Step 3 needs the state before the second token: one per distinct first token among the beams of two tokens.
    assert gates[:3] == [UNITS, UNITS, len(prefixes(two, decoder.config.ids.stop, 1))]
    assert gates[2] < 20 * UNITS


def test_rerank_language_model_runs_every_distinct_beginning_once(rows: Rows) -> None:
    decoder, lm, features = captioner(stop_bias=1.0)
    beams = beam_search(decoder, features, beam_size=20, length=6)
    rows.clear()
    beam_logp(lm, beams)
    stop = decoder.config.ids.stop
    everyone = [{prefix[1:] for prefix in prefixes(beams, stop, t)} for t in range(1, 6)]
    assert rows[HIDDEN, lm.config.ids.total] == [1, *map(len, everyone)]


def test_beam_candidates_do_not_depend_on_batch_mates() -> None:
    decoder, _, features = captioner(stop_bias=3.0)
    together = beam_search(decoder, features, beam_size=12, length=7)
    for unit in range(UNITS):
        alone = beam_search(decoder, features[unit : unit + 1], beam_size=12, length=7)
        length = alone.tokens.shape[2]
        assert together.tokens[unit, :, :length].tolist() == alone.tokens[0].tolist()
        torch.testing.assert_close(together.scores[unit], alone.scores[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("columns", "count"), [(60, 6), (60, 7), (6, 6), (50, 1), (2500, 50)])
def test_largest_any_shape_equals_topk(columns: int, count: int) -> None:
    values = torch.from_numpy(np.random.default_rng(columns).permutation(3 * columns).reshape(3, columns)).float()
    values[1, columns // 2 :] = -torch.inf if columns // 2 >= count else -1 - values[1, columns // 2 :]
    found, expected = largest(values, count), values.topk(count, dim=1)
    assert found[0].tolist() == expected.values.tolist()
    assert found[1].tolist() == expected.indices.tolist()
