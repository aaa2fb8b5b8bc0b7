from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from milan_ray.captioner.beam import Beams
from milan_ray.captioner.captioner import Candidates, Captioner, best_descriptions
from milan_ray.captioner.decoder import decode_forced, decode_stepwise
from milan_ray.captioner.quirks import REFERENCE, Quirks
from milan_ray.captioner.rerank import beam_logp, rescore
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.errors import MilanError


def naive_logp(captioner: Captioner, tokens: list[int]) -> float:
    assert captioner.lm is not None
    inputs = torch.tensor([[captioner.indexer.ids.start, *tokens]])
    with torch.no_grad():
        log_probs = captioner.lm(inputs)[0]
    return sum(log_probs[t, token].item() for t, token in enumerate(tokens))


def test_candidates_logprobs_equal_scoring_their_tokens(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    candidates = tiny.candidates(tiny_features, length=4)
    assert candidates.logp_d is not None
    assert candidates.finished.any() and not candidates.finished.all()
    for unit in range(len(tiny_features)):
        for beam, tokens in enumerate(candidates.tokens[unit]):
            forced = decode_forced(tiny.decoder, tiny_features[unit : unit + 1], torch.tensor([tokens]))
            assert candidates.logp_d_given_e[unit, beam] == pytest.approx(forced.scores.item(), abs=1e-4)
            assert candidates.logp_d[unit, beam] == pytest.approx(naive_logp(tiny, tokens), abs=1e-4)
            assert candidates.finished[unit, beam] == (tokens[-1] == tiny.indexer.ids.stop)
            assert candidates.texts[unit][beam] == tiny.indexer.reconstruct(tokens)


def test_score_of_a_text_equals_forced_decoding_through_stop(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    texts = ["red dog", "the round cat."]
    targets = tiny.indexer.index(texts, start=False, pad=False)
    for mi in (False, True):
        lm = tiny.lm if mi else None
        expected = [
            decode_forced(tiny.decoder, tiny_features[i : i + 1], torch.tensor([row]), lm).scores.item()
            for i, row in enumerate(targets)
        ]
        assert tiny.score(texts, tiny_features[:2], mi=mi).tolist() == pytest.approx(expected, abs=1e-4)


def test_score_of_one_unit_is_that_unit_for_every_text(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    texts = ["red dog", "the round cat.", "unheard of"]
    repeated = tiny_features[:1].expand(3, -1, -1)
    assert tiny.score(texts, tiny_features[:1]).tolist() == tiny.score(texts, repeated).tolist()
    with pytest.raises(MilanError, match="3 texts need the features of 3 units, or of one, not of 2"):
        tiny.score(texts, tiny_features[:2])


def test_decode_defaults_follow_the_language_model_and_the_captioners_strategy(
    tiny: Captioner, tiny_features: torch.Tensor
) -> None:
    def same(captioner: Captioner, **options: Any) -> bool:
        return torch.equal(captioner.decode(tiny_features).scores, captioner.decode(tiny_features, **options).scores)

    plain = replace(tiny, lm=None)
    greedy = replace(tiny, strategy="greedy")
    assert same(tiny, strategy="rerank", mi=False) and not same(tiny, strategy="beam")
    assert same(plain, strategy="beam", mi=False)
    assert same(greedy, strategy="greedy", mi=True, lam=tiny.lam) and not same(greedy, strategy="greedy", mi=False)
    texts = [unit[0].text for unit in tiny.describe(tiny_features)]
    assert tiny.decode(tiny_features).texts == texts == greedy.decode(tiny_features, "rerank").texts


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam", "rerank"])
def test_decode_no_units_gives_nothing(tiny: Captioner, tiny_features: torch.Tensor, strategy: str) -> None:
    assert tiny.decode(tiny_features[:0], strategy).texts == []


def test_decode_what_does_not_go_together_is_refused(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    plain = replace(tiny, lm=None)
    for captioner, options, message in (
        (plain, {"strategy": "rerank"}, "needs a language model"),
        (plain, {"strategy": "greedy", "mi": True}, "needs a language model"),
        (tiny, {"strategy": "rerank", "mi": True}, "after the search"),
        (tiny, {"strategy": "greddy"}, "unknown strategy 'greddy'; nearest: greedy"),
        (tiny, {"strategy": torch.zeros(3, 2, dtype=torch.long)}, r"8 units need tokens of shape \(8, T\)"),
    ):
        with pytest.raises(MilanError, match=message):
            captioner.decode(tiny_features, **options)


def test_describe_larger_lam_prefers_the_unexpected(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    candidates = tiny.candidates(tiny_features)
    assert candidates.logp_d is not None
    for lam in (0.0, 0.2, 5.0):
        best = [unit[0] for unit in tiny.describe(tiny_features, lam=lam, quirks=Quirks(plain_choice=True))]
        expected = (candidates.logp_d_given_e - lam * candidates.logp_d).max(axis=1)
        assert [one.score for one in best] == pytest.approx(expected.tolist(), abs=1e-5)
        for one in best:
            assert one.logp_d is not None
            assert one.score == pytest.approx(one.logp_d_given_e - lam * one.logp_d, abs=1e-4)


def test_describe_n_best_falls_in_score(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    for unit in tiny.describe(tiny_features, n_best=4, quirks=Quirks(plain_choice=True)):
        assert len(unit) == 4
        assert [one.score for one in unit] == sorted((one.score for one in unit), reverse=True)


SAID = ["The top of the", "The", "", "People 's heads", "Long but", "Dogs"]
"""Of which the model finds the first two unlikeliest as sentences; the fifth is the end of the longest beam."""


def said(finished: list[bool]) -> Candidates:
    likely = np.array([[-1.0, -2.0, -3.0, -4.0, -4.5, -5.0]])
    return Candidates([], np.array([finished]), likely, likely * 4 - 8, [SAID])


def test_what_breaks_off_never_wins_over_a_complete_description() -> None:
    candidates = said([True, True, True, True, False, False])
    for lam in (0.0, 0.2):
        (found,) = best_descriptions(candidates, lam, n_best=6)
        assert found[0].text == "People's heads"
        assert found[0].score == pytest.approx(candidates.scores(lam)[0, 3])
        rest = [one.score for one in found[1:]]
        assert rest == sorted(rest, reverse=True)
        (plain,) = best_descriptions(candidates, lam, n_best=6, quirks=Quirks(plain_choice=True))
        assert [one.text for one in plain] == [SAID[place] for place in candidates.order(lam)[0]]
    assert plain[0].text != "People 's heads"


def test_what_breaks_off_is_said_where_nothing_is_complete() -> None:
    ((best,),) = best_descriptions(said([True, True, True, False, False, False]), 0.0)
    assert best.text == "The top of the"


def test_rescore_any_lam_is_linear() -> None:
    given, prior = np.array([[-1.0, -2.0]]), np.array([[-4.0, -8.0]])
    assert rescore(given, prior, 0.5).tolist() == [[1, 2]]


def test_captioner_without_language_model_ranks_by_likelihood_only(
    tiny: Captioner, tiny_features: torch.Tensor
) -> None:
    plain = Captioner(tiny.indexer, tiny.decoder, None, "resnet18", beam_size=3)
    (best, *_), *_ = plain.describe(tiny_features, lam=0)
    assert best.logp_d is None and best.score == best.logp_d_given_e
    with pytest.raises(MilanError, match="needs a language model"):
        plain.describe(tiny_features, lam=0.2)


def test_quirk_past_stop_counts_one_token_more_where_there_is_one(tiny: Captioner) -> None:
    assert tiny.lm is not None
    stop = tiny.indexer.ids.stop
    beams = Beams(torch.tensor([[[0, stop, stop], [0, 1, stop], [0, 1, 2]]]), torch.zeros(1, 3), torch.tensor([3]))
    plain = beam_logp(tiny.lm, beams)[0].tolist()
    quirky = beam_logp(tiny.lm, beams, Quirks(lm_counts_past_stop=True))[0].tolist()
    assert plain == pytest.approx([naive_logp(tiny, t) for t in ([0, stop], [0, 1, stop], [0, 1, 2])], abs=1e-5)
    assert quirky == pytest.approx([naive_logp(tiny, t) for t in ([0, stop, stop], [0, 1, stop], [0, 1, 2])], abs=1e-5)


def test_quirk_batch_dependent_length_changes_a_score_with_its_batch(tiny: Captioner) -> None:
    assert tiny.lm is not None
    stop = tiny.indexer.ids.stop
    alone = Beams(torch.tensor([[[0, stop]]]), torch.zeros(1, 1), torch.tensor([2]))
    longer = Beams(torch.tensor([[[0, stop, stop]], [[0, 1, stop]]]), torch.zeros(2, 1), torch.tensor([2, 3]))
    for quirks, same in ((Quirks(), True), (Quirks(lm_counts_past_stop=True), True), (REFERENCE, False)):
        one, two = beam_logp(tiny.lm, alone, quirks)[0], beam_logp(tiny.lm, longer, quirks)[0]
        assert torch.allclose(one, two) is same


def test_sample_same_seed_same_tokens_and_predictions_follow(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    draws = [decode_stepwise(tiny.decoder, tiny_features, 6, tiny.lm, sample=True, generator=g) for g in generators]
    assert torch.equal(draws[0].tokens, draws[1].tokens)
    forced = decode_forced(tiny.decoder, tiny_features, draws[0].tokens, tiny.lm)
    assert torch.allclose(forced.log_probs, draws[0].log_probs, atol=1e-4)
    assert torch.allclose(forced.scores, draws[0].scores, atol=1e-4)


def test_sample_many_draws_have_the_predicted_frequencies(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    many = tiny_features[:1].expand(20_000, -1, -1)
    decoded = decode_stepwise(tiny.decoder, many, 1, sample=True, generator=torch.Generator().manual_seed(0))
    counts = decoded.tokens[:, 0].bincount(minlength=tiny.indexer.ids.total) / len(many)
    assert torch.allclose(counts, decoded.log_probs[0, 0].exp(), atol=0.015)


def test_captioner_wrong_features_say_what_fits(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    with pytest.raises(MilanError, match=r"shape \(units, exemplars, 6\) and got \(8, 3, 4\).*resnet18"):
        tiny.candidates(tiny_features[..., :4])
    broken = tiny_features.clone()
    broken[2, 1, 0] = torch.nan
    with pytest.raises(MilanError, match=r"unit rows \[2\] hold NaN"):
        tiny.candidates(broken)


def test_captioner_parts_of_different_vocabularies_are_refused(tiny: Captioner) -> None:
    with pytest.raises(MilanError, match="different vocabularies"):
        Captioner(Indexer(Vocabulary(("red",))), tiny.decoder, tiny.lm, "resnet18")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captioner_on_a_gpu_agrees_with_the_cpu(tiny: Captioner, tiny_features: torch.Tensor) -> None:
    on_cpu = tiny.candidates(tiny_features)
    on_gpu = tiny.to("auto").candidates(tiny_features)
    assert on_gpu.tokens == on_cpu.tokens
    np.testing.assert_allclose(on_gpu.logp_d_given_e, on_cpu.logp_d_given_e, atol=1e-4)
    assert on_gpu.logp_d is not None and on_cpu.logp_d is not None
    np.testing.assert_allclose(on_gpu.logp_d, on_cpu.logp_d, atol=1e-4)
