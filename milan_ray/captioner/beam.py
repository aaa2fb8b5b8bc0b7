"""Beam search over units × beams at once, with the semantics of AllenNLP's beam search.

On a GPU, all beams take part in every step (:func:`search_all_beams`): to leave some out, the host would have to ask
how many are left. On a CPU, attention keys and the token half of the LSTM's input are projected once; beams that
reached ``<stop>`` are skipped; and the computations that depend on the state only (attention, gate, most of the LSTM's
input: nine tenths of the work) run once per *distinct parent*, not once per beam. In the first step, all beams of a
unit have the same parent; later, 50 beams have about 25 distinct parents. The two searches differ by float error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.captioner.decoder import Decoder, DecoderProducts
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.products import Product
from milan_ray.errors import MilanError


@dataclass(frozen=True)
class Beams:
    """The most likely descriptions of B units, best first.

    Attributes:
        tokens: Token ids (B, beam, L); all tokens after the first ``<stop>`` are ``<stop>``.
        scores: Summed log-probabilities (B, beam), nats, descending.
        steps: Tokens until all beams of the unit were finished or the search ended (B,).
    """

    tokens: Tensor
    scores: Tensor
    steps: Tensor


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    features: Tensor,
    beam_size: int = 50,
    length: int = 15,
    lm: LanguageModel | None = None,
    lam: float = 0.2,
    skip: bool | None = None,
) -> Beams:
    """Finds the most likely descriptions.

    Args:
        decoder: The decoder.
        features: (B, k, F), on the decoder's device.
        beam_size: Beams per unit.
        length: Maximum tokens of a description, ``<stop>`` included; longer ones stay unfinished.
        lm: If given, the search maximises log p(d|E) − λ log p(d), subtracted token by token.
        lam: λ.
        skip: Whether to leave out finished and repeated beams, at least half of the work; the host then waits for the
            device at every step, for how many are left. None leaves them out on a CPU only.

    Raises:
        MilanError: The vocabulary has fewer tokens than there are beams, or the length is below 1.
    """
    ids = decoder.config.ids
    _check(ids.total, beam_size, length)
    units, device = len(features), features.device
    if units and not (device.type == "cpu" if skip is None else skip):
        beams = search_all_beams(decoder, features, beam_size, length, lm, lam)
        return Beams(beams.tokens[:, :, : int(beams.steps.max())], beams.scores, beams.steps)
    products, lm_output = DecoderProducts(decoder), Product.of(lm.output) if lm is not None else None
    keys = products.keys(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    # A "row" is an unfinished sequence. Only rows have states; `row_of` maps beams to rows.
    h, c = decoder.initial_state(features)
    unit_of = torch.arange(units, device=device)
    row_of = unit_of.unsqueeze(1)  # (B, 1): before the first step, one beam per unit
    parent = torch.zeros(units, 1, dtype=torch.long, device=device)
    last = torch.full((units, 1), ids.start, device=device)
    scores = torch.zeros(units, 1, device=device)
    tokens = torch.empty(units, 1, 0, dtype=torch.long, device=device)
    steps = torch.zeros(units, dtype=torch.long, device=device)
    lm_state = None

    for _ in range(length):
        running = last != ids.stop
        unit, beam = running.nonzero(as_tuple=True)
        if not len(unit):
            break
        steps += running.any(dim=1)
        before = row_of[unit, parent[unit, beam]]
        distinct, child_of = torch.unique(before, return_inverse=True)
        h = h.index_select(0, distinct)
        gates = products.state_gates(h, _contexts(decoder, products, features, keys, h, unit_of[distinct]))
        token = last[unit, beam]
        gates = gates.index_select(0, child_of).add_(F.embedding(token, products.token_gates))
        h, c = decoder.cell(gates, c.index_select(0, before))
        log_probs = F.log_softmax(products.output(h), dim=1)
        if lm is not None:
            lm_state = lm_state and (lm_state[0][:, before], lm_state[1][:, before])
            lm_log_probs, lm_state = lm.step(token, lm_state, lm_output)
            log_probs = log_probs - lam * lm_log_probs
        row_of, unit_of = running.flatten().cumsum(0).view_as(running) - 1, unit

        scores, parent, last = _extend(scores, log_probs, unit, beam, ids.stop, beam_size)
        tokens = torch.cat([tokens.gather(1, parent.unsqueeze(2).expand(-1, -1, tokens.shape[2])), last[..., None]], 2)
    return Beams(tokens, scores, steps)


@torch.no_grad()
def search_all_beams(
    decoder: Decoder,
    features: Tensor,
    beam_size: int = 50,
    length: int = 15,
    lm: LanguageModel | None = None,
    lam: float = 0.2,
) -> Beams:
    """The search of :func:`beam_search` with all beams at every step.

    No size depends on values, so the host never waits for a GPU.

    Returns:
        The beams of :func:`beam_search`, with ``length`` tokens each: columns of ``<stop>`` follow the last step.
    """
    units, device, stop = len(features), features.device, decoder.config.ids.stop
    keys = decoder.attend.key_to_hidden(features).unsqueeze(1)
    token_gates, context_weight = decoder.token_gates(), decoder.input_weights()[1]
    first_beam = torch.arange(units, device=device).unsqueeze(1)
    h, c = decoder.initial_state(features)
    last = torch.full((units, 1), decoder.config.ids.start, device=device)
    scores = torch.zeros(units, 1, device=device)
    tokens = torch.empty(units, 1, 0, dtype=torch.long, device=device)
    steps = torch.zeros(units, dtype=torch.long, device=device)
    lm_state = None
    for _ in range(length):
        running = last != stop
        steps += running.any(dim=1)
        context = torch.bmm(decoder.attend(h.unflatten(0, scores.shape), keys), features).flatten(0, 1)
        gates = decoder.state_gates(h, context, context_weight) + F.embedding(last.flatten(), token_gates)
        h, c = decoder.cell(gates, c)
        log_probs = decoder.output(h)
        if lm is not None:
            lm_log_probs, lm_state = lm.step(last.flatten(), lm_state)
            log_probs = log_probs - lam * lm_log_probs
        candidates = log_probs.unflatten(0, scores.shape) + scores.unsqueeze(2)
        # A finished beam has one extension, another <stop>, at no cost.
        stopping = torch.where(running, candidates[..., stop], scores)
        candidates = candidates.masked_fill(~running.unsqueeze(2), -torch.inf)
        candidates[..., stop] = stopping
        before = scores.shape[1]
        scores, chosen = largest(candidates.flatten(1), beam_size)
        parent, last = chosen // candidates.shape[2], chosen % candidates.shape[2]
        rows = (first_beam * before + parent).flatten()
        h, c = h.index_select(0, rows), c.index_select(0, rows)
        lm_state = lm_state and (lm_state[0].index_select(1, rows), lm_state[1].index_select(1, rows))
        tokens = torch.cat([tokens.gather(1, parent.unsqueeze(2).expand(-1, -1, tokens.shape[2])), last[..., None]], 2)
    return Beams(tokens, scores, steps)


def _check(vocabulary: int, beam_size: int, length: int) -> None:
    """Refuses a beam that is larger than the vocabulary, and a length below 1."""
    if not 1 <= beam_size <= vocabulary:
        raise MilanError(
            f"a beam of {beam_size} does not fit a vocabulary of {vocabulary} tokens; set the beam size to "
            f"1…{vocabulary}"
        )
    if length < 1:
        raise MilanError(f"a description of {length} tokens says nothing; set the length to 1 or more")


def _extend(
    scores: Tensor, log_probs: Tensor, unit: Tensor, beam: Tensor, stop: int, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the best extensions of all beams by one token; finished beams keep their scores.

    Args:
        scores: Scores of the beams (B, beams).
        log_probs: Log-probabilities of the next token (R, V) of the R unfinished beams; overwritten.
        unit: Their units (R,).
        beam: Their beams (R,).
        stop: Id of ``<stop>``.
        beam_size: Beams per unit afterwards.

    Returns:
        Scores, parent beams and tokens of the new beams, each (B, beam_size).
    """
    # Unfinished beams are laid out as (unit, slot): a unit has few of them after a few steps.
    slot = torch.arange(len(unit), device=unit.device) - torch.searchsorted(unit, unit)
    slots, vocabulary = int(slot.max()) + 1, log_probs.shape[1]
    extended = scores.new_full((len(scores), slots, vocabulary), -torch.inf)
    extended[unit, slot] = log_probs.add_(scores[unit, beam].unsqueeze(1))
    beam_of = beam.new_zeros(len(scores), slots)
    beam_of[unit, slot] = beam
    best, chosen = largest(extended.flatten(1), min(beam_size, slots * vocabulary))
    finished = scores.clone()
    finished[unit, beam] = -torch.inf
    parent = torch.cat(
        [torch.arange(scores.shape[1], device=unit.device).expand_as(scores), beam_of.gather(1, chosen // vocabulary)],
        1,
    )
    token = torch.cat([torch.full_like(scores, stop, dtype=chosen.dtype), chosen % vocabulary], 1)
    scores, chosen = torch.cat([finished, best], 1).topk(beam_size, dim=1)
    return scores, parent.gather(1, chosen), token.gather(1, chosen)


def _contexts(
    decoder: Decoder, products: DecoderProducts, features: Tensor, keys: Tensor, h: Tensor, owner: Tensor
) -> Tensor:
    """The attention-weighted features (R, F) of states h (R, hidden) of units ``owner`` (R,), ascending.

    Unit by unit, so that a unit's keys and features are shared and not copied per row, no unit has as many rows as the
    one with the most, and what the tanh is taken of stays in the processor's cache.
    """
    counts = torch.bincount(owner, minlength=len(features)).tolist()
    queries, energies = products.query(h).unsqueeze(1).split(counts), h.new_empty(len(h), keys.shape[1])
    weight, bias = (decoder.attend.output[0].get_parameter(name) for name in ("weight", "bias"))
    for query, key, energy in zip(queries, keys, energies.split(counts), strict=True):
        if len(query):
            torch.matmul((query + key).tanh_(), weight[0], out=energy)
    weights = energies.add_(bias).softmax(dim=1)
    contexts = features.new_empty(len(h), features.shape[2])
    for some, feature, context in zip(weights.split(counts), features, contexts.split(counts), strict=True):
        if len(some):
            torch.mm(some, feature, out=context)
    return contexts


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest values of every row and their indices, descending, as ``topk``, but several times faster.

    They all lie in the ``count`` blocks that have the largest maxima, so only these are sorted.

    Args:
        values: (B, N), N ≥ count.
        count: Number of values.
    """
    if values.shape[1] % count:
        return values.topk(count, dim=1)
    blocks = values.unflatten(1, (-1, count))
    block = blocks.amax(dim=2).topk(min(count, blocks.shape[1]), dim=1, sorted=False).indices
    best, index = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, count)).flatten(1).topk(count, dim=1)
    return best, block.gather(1, index // count) * count + index % count
