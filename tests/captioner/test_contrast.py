"""Log p(d|C) of candidates, against the decoder one candidate at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import toy_captioner

from milan_ray.captioner.contrast import logp_given


def test_logp_given_other_images_is_the_decoders_over_the_tokens_that_there_are():
    captioner = toy_captioner(length=6, beam_size=5)
    features = np.random.default_rng(0).normal(size=(2, 4, 10)).astype(np.float32)
    tokens = captioner.candidates(features[:1], 5, 6).tokens[0]
    tokens.append([5, 6, 7])  # one that broke off
    found = logp_given(captioner, tokens, features[1])
    for own, value in zip(tokens, found, strict=True):
        with torch.no_grad():
            log_probs, _ = captioner.decoder(torch.from_numpy(features[1:]), torch.tensor([own]))
        assert value == pytest.approx(float(log_probs[0].gather(1, torch.tensor([own]).T).sum()), abs=1e-5)


def test_logp_given_the_exemplars_is_that_of_the_search():
    captioner = toy_captioner(length=6, beam_size=5)
    features = np.random.default_rng(0).normal(size=(1, 4, 10)).astype(np.float32)
    candidates = captioner.candidates(features, 5, 6)
    np.testing.assert_allclose(
        logp_given(captioner, candidates.tokens[0], features[0]), candidates.logp_d_given_e[0], atol=1e-5
    )


def test_logp_given_no_candidates_or_empty_ones_is_zero():
    captioner, features = toy_captioner(), np.zeros((2, 10), np.float32)
    assert logp_given(captioner, [], features).shape == (0,)
    assert logp_given(captioner, [[]], features).tolist() == [0.0]
