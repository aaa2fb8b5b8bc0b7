"""Log p(d|C): how likely a captioner finds descriptions, given other images than those that they were made for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import decode_forced
from milan_ray.device import to_device


def logp_given(captioner: Captioner, tokens: Sequence[Sequence[int]], features: np.ndarray, length: int) -> np.ndarray:
    """Log p(d|C) of the candidates of one unit, summed over the tokens that each has, as its log p(d|E) is.

    The result does not depend on other units: a unit is a batch of its own, padded to one length.

    Args:
        captioner: The captioner.
        tokens: Token ids of N candidates, ``<stop>`` included where they reached it.
        features: Features of the images C, float32 (k, F).
        length: Most tokens of a candidate.

    Returns:
        Nats, float32 (N,).
    """
    ids, decoder = captioner.decoder.config.ids, captioner.decoder
    padded = torch.full((len(tokens), length), ids.pad)
    counted = torch.zeros(len(tokens), length, dtype=torch.bool)
    for row, own in enumerate(tokens):
        padded[row, : len(own)] = torch.tensor(own, dtype=torch.long)
        counted[row, : len(own)] = True
    weight = decoder.embedding.weight
    images = to_device(torch.from_numpy(features.copy()).to(weight.dtype), weight.device)
    targets = to_device(padded, weight.device)
    decoded = decode_forced(decoder, images.expand(len(tokens), -1, -1), targets)
    assert decoded.log_probs is not None
    chosen = decoded.log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    return (chosen * to_device(counted, weight.device)).sum(dim=1).cpu().numpy()
