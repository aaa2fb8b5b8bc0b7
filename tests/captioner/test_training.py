import copy
from collections.abc import Callable

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.quirks import REFERENCE
from milan_ray.captioner.training import (
    DecoderBatch,
    EarlyStopping,
    LMBatch,
    collate_decoder,
    collate_lm,
    decoder_epoch,
    decoder_loss,
    greedy_captions,
    lm_epoch,
    lm_loss,
    optimizer_for,
    share_of,
    shuffled_batches,
    token_loss,
)
from milan_ray.config import TrainingConfig

CAPTIONS = ["red dog", "blue cat.", "the round cat", "a dog of a cat", "red", "blue", "the cat.", "round dog"]


@pytest.fixture
def words(tiny: Captioner) -> list[list[int]]:
    return [tiny.indexer.words(tiny.indexer.tokenizer(text)) for text in CAPTIONS]


def test_collate_pads_to_the_batch_and_shifts_the_language_model(tiny: Captioner, words: list[list[int]]) -> None:
    ids = tiny.indexer.ids
    batch = collate_decoder(torch.zeros(2, 3, 6), words[:2], tiny.indexer)
    assert batch.targets.tolist() == [[0, 2, ids.stop, ids.pad], [1, 3, 8, ids.stop]]
    lm_batch = collate_lm(words[:2], tiny.indexer)
    assert lm_batch.inputs.tolist() == [[ids.start, 0, 2, ids.pad], [ids.start, 1, 3, 8]]
    assert lm_batch.targets.tolist() == batch.targets.tolist()


def test_shuffled_batches_depend_on_seed_and_epoch_alone() -> None:
    items = list(range(10))
    first = list(shuffled_batches(items, 4, seed=3, epoch=1))
    assert first == list(shuffled_batches(items, 4, seed=3, epoch=1))
    assert first != list(shuffled_batches(items, 4, seed=3, epoch=2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(item for batch in first for item in batch) == items


def test_decoder_epochs_learn_the_captions_by_heart(
    tiny: Captioner, tiny_features: torch.Tensor, words: list[list[int]]
) -> None:
    torch.manual_seed(0)
    config = TrainingConfig(learning_rate=0.02, regularization_weight=0.1)
    decoder, pad = tiny.decoder, tiny.indexer.ids.pad
    dropout = decoder.output[0]
    assert isinstance(dropout, torch.nn.Dropout)
    dropout.p = 0.1
    optimizer = optimizer_for(decoder, config)
    batch = collate_decoder(tiny_features, words, tiny.indexer)

    def loss() -> float:
        with torch.no_grad():
            return float(token_loss(decoder.eval()(batch.features, batch.targets)[0], batch.targets, pad))

    before = loss()
    for _ in range(250):
        decoder_epoch(decoder, optimizer, [batch], pad, config)
    assert loss() < 0.1 < before
    said = greedy_captions(decoder, tiny_features, tiny.indexer)
    assert sum(a.lower() == b for a, b in zip(said, CAPTIONS, strict=True)) >= 7


def test_lm_epochs_lower_the_loss(tiny: Captioner, words: list[list[int]]) -> None:
    assert tiny.lm is not None
    torch.manual_seed(0)
    config = TrainingConfig(learning_rate=0.02)
    optimizer, pad = optimizer_for(tiny.lm, config), tiny.indexer.ids.pad
    batches = [collate_lm(batch, tiny.indexer) for batch in shuffled_batches(words, 4, seed=0, epoch=0)]
    before = lm_loss(tiny.lm, batches, pad)
    for _ in range(60):
        lm_epoch(tiny.lm, optimizer, batches, pad, config)
    assert lm_loss(tiny.lm, batches, pad) < 0.6 * before


def test_lm_loss_without_padding_is_the_mean_over_tokens(tiny: Captioner, words: list[list[int]]) -> None:
    assert tiny.lm is not None
    batch, pad = collate_lm(words, tiny.indexer), tiny.indexer.ids.pad
    padded = token_loss(tiny.lm.eval()(batch.inputs), batch.targets, pad)
    assert lm_loss(tiny.lm, [batch], pad) == pytest.approx(padded.item(), abs=1e-6)
    halves = [collate_lm(words[:3], tiny.indexer), collate_lm(words[3:], tiny.indexer)]
    assert lm_loss(tiny.lm, halves, pad) == pytest.approx(padded.item(), abs=1e-6)


def trained(model: torch.nn.Module, batches: list[LMBatch] | list[DecoderBatch], pad: int) -> dict[str, torch.Tensor]:
    """Mean gradients over workers that have a batch each; nothing is learnt."""
    model = copy.deepcopy(model)
    sums: dict[str, torch.Tensor] = {}
    for module in model.modules():  # no dropout, which each worker draws anew
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.LSTM):
            module.dropout = 0.0
    config = TrainingConfig(learning_rate=0)
    for batch in batches:
        if isinstance(batch, LMBatch):
            lm_epoch(model, optimizer_for(model, config), [batch], pad, config)
        else:
            decoder_epoch(model, optimizer_for(model, config), [batch], pad, config)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, 0) + parameter.grad / len(batches)
    return sums


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_share_of_makes_workers_mean_gradient_that_of_the_whole_batch(
    tiny: Captioner, tiny_features: torch.Tensor, words: list[list[int]], cut: int
) -> None:
    pad, longest = tiny.indexer.ids.pad, max(map(len, words))
    parts = [(words[:cut], tiny_features[:cut]), (words[cut:], tiny_features[cut:])]
    shares = [share_of(part, words, workers=2) for part, _ in parts]
    # A worker without a caption of its own computes any, at no weight: all of them must take part.
    parts = [(part or words[:1], features if part else tiny_features[:1]) for part, features in parts]
    lm = [collate_lm(part, tiny.indexer, share) for (part, _), share in zip(parts, shares, strict=True)]
    decoder = [
        collate_decoder(features, part, tiny.indexer, longest, share)
        for (part, features), share in zip(parts, shares, strict=True)
    ]
    assert tiny.lm is not None
    torch.testing.assert_close(trained(tiny.lm, lm, pad), trained(tiny.lm, [collate_lm(words, tiny.indexer)], pad))
    whole = [collate_decoder(tiny_features, words, tiny.indexer)]
    torch.testing.assert_close(trained(tiny.decoder, decoder, pad), trained(tiny.decoder, whole, pad))


def test_epochs_in_bf16_lower_the_loss_and_keep_float32_weights(
    tiny: Captioner, tiny_features: torch.Tensor, words: list[list[int]]
) -> None:
    torch.manual_seed(0)
    config, pad = TrainingConfig(learning_rate=0.02, bf16=True), tiny.indexer.ids.pad
    assert tiny.lm is not None
    parts: list[tuple[torch.nn.Module, Callable[..., float], object]] = [
        (tiny.lm, lm_epoch, collate_lm(words, tiny.indexer)),
        (tiny.decoder, decoder_epoch, collate_decoder(tiny_features, words, tiny.indexer)),
    ]
    for model, epoch, batch in parts:
        optimizer = optimizer_for(model, config)
        losses = [epoch(model, optimizer, [batch], pad, config) for _ in range(40)]
        assert losses[-1] < 0.8 * losses[0]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_epoch_without_batches_is_nan_not_an_error(tiny: Captioner) -> None:
    config = TrainingConfig()
    assert torch.isnan(torch.tensor(decoder_epoch(tiny.decoder, optimizer_for(tiny.decoder, config), [], 0, config)))


def trained_metrics(stopping: EarlyStopping, metrics: list[float]) -> tuple[int, float]:
    """Runs made-up epochs on one weight that holds the epoch's number; returns where it stopped and what is kept."""
    model = torch.nn.Linear(1, 1, bias=False)
    for epoch, metric in enumerate(metrics):
        with torch.no_grad():
            model.weight.fill_(epoch)
        if stopping.update(epoch, metric, model):
            break
    stopping.restore(model)
    return epoch, model.weight.item()


def test_decoder_loss_is_the_mean_over_tokens_whatever_the_batches(tiny: Captioner, words: list[list[int]]) -> None:
    features, pad = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(0)), tiny.indexer.ids.pad
    whole = collate_decoder(features, words[:3], tiny.indexer)
    parts = [collate_decoder(features[rows], words[rows], tiny.indexer) for rows in (slice(2), slice(2, 3))]
    loss = decoder_loss(tiny.decoder.train(), [whole], pad)  # measured without dropout
    assert decoder_loss(tiny.decoder, parts, pad) == pytest.approx(loss, rel=1e-5)
    with torch.no_grad():
        log_probs, _ = tiny.decoder(features, whole.targets)
    of_tokens = log_probs.gather(2, whole.targets[..., None])[..., 0][whole.targets != pad]
    assert loss == pytest.approx(-float(of_tokens.mean()), rel=1e-5)


def test_early_stopping_keeps_the_best_epochs_weights() -> None:
    stopping = EarlyStopping(patience=2)
    assert trained_metrics(stopping, [1, 3, 2, 3, float("nan"), 9, 9]) == (4, 1.0)
    assert (stopping.best, stopping.kept_epoch) == (3, 1)


def test_early_stopping_quirk_keeps_the_last_epochs_weights() -> None:
    assert trained_metrics(EarlyStopping(2, REFERENCE.keep_last_weights), [1, 3, 2, 3, 0, 9]) == (4, 4.0)


def test_early_stopping_resumed_from_its_state_goes_on_as_if_never_stopped() -> None:
    model = torch.nn.Linear(1, 1)
    first = EarlyStopping(patience=1)
    first.update(0, 5.0, model)
    first.update(1, 4.0, model)
    resumed = EarlyStopping(**copy.deepcopy(first.state()))
    assert resumed.update(2, 4.0, model) is True
    assert resumed.kept_epoch == 0 and resumed.weights.keys() == model.state_dict().keys()
