"""Log p(d|C): how likely a captioner finds descriptions, given other images than those that they were made for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from milan_ray.captioner.captioner import Captioner
from milan_ray.device import to_device


@torch.no_grad()
def logp_given(captioner: Captioner, tokens: Sequence[Sequence[int]], features: np.ndarray) -> np.ndarray:
    """Log p(d|C) of the candidates of one unit, summed over the tokens that each has, as its log p(d|E) is.

    The decoder of :meth:`milan_ray.captioner.decoder.Decoder.forward`, with the images' projections computed once for
    all candidates. The result does not depend on other units, which are no part of the batch.

    Args:
        captioner: The captioner.
        tokens: Token ids of N candidates, ``<stop>`` included where they reached it.
        features: Features of the images C, float32 (k, F).

    Returns:
        Nats, float32 (N,).
    """
    ids, decoder = captioner.decoder.config.ids, captioner.decoder
    length = max(map(len, tokens), default=0)
    if not length:
        return np.zeros(len(tokens), np.float32)
    padded = torch.full((len(tokens), length), ids.pad)
    for row, own in enumerate(tokens):
        padded[row, : len(own)] = torch.tensor(own, dtype=torch.long)
    counted = torch.arange(length) < torch.tensor([len(own) for own in tokens])[:, None]
    weight = decoder.embedding.weight
    images = to_device(torch.from_numpy(features.copy()).to(weight.dtype), weight.device)
    targets, used = to_device(padded, weight.device), to_device(counted, weight.device)
    keys, (h, c) = decoder.attend.key_to_hidden(images), decoder.initial_state(images[None])
    h, c = h.expand(len(tokens), -1), c.expand(len(tokens), -1)
    inputs = torch.cat([targets.new_full((len(tokens), 1), ids.start), targets[:, :-1]], dim=1)
    token_gates, context_weight = F.embedding(inputs, decoder.token_gates()), decoder.input_weights()[1]
    states = []
    for step in range(length):
        context = decoder.attend(h, keys) @ images
        h, c = decoder.cell(decoder.state_gates(h, context, context_weight) + token_gates[:, step], c)
        states.append(h)
    log_probs = decoder.output(torch.stack(states, dim=1))
    chosen = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    return np.asarray((chosen * used).sum(dim=1).cpu())
