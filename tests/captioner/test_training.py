import copy

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.quirks import REFERENCE
from milan_ray.captioner.training import (
    EarlyStopping,
    TrainingConfig,
    collate_decoder,
    collate_lm,
    decoder_epoch,
    decoder_loss,
    greedy_captions,
    lm_epoch,
    lm_loss,
    optimizer_for,
    shuffled_batches,
)

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
    decoder.output[0].p = 0.1
    optimizer = optimizer_for(decoder, config)
    batch = collate_decoder(tiny_features, words, tiny.indexer)
    before = decoder_loss(decoder, [batch], pad)
    for _ in range(250):
        decoder_epoch(decoder, optimizer, [batch], pad, config)
    assert decoder_loss(decoder, [batch], pad) < 0.1 < before
    said = greedy_captions(decoder, tiny_features, tiny.indexer)
    assert sum(a.lower() == b for a, b in zip(said, CAPTIONS, strict=True)) >= 7


def test_lm_epochs_lower_the_loss(tiny: Captioner, words: list[list[int]]) -> None:
    assert tiny.lm is not None
    torch.manual_seed(0)
    optimizer, pad = optimizer_for(tiny.lm, TrainingConfig(learning_rate=0.02)), tiny.indexer.ids.pad
    batches = [collate_lm(batch, tiny.indexer) for batch in shuffled_batches(words, 4, seed=0, epoch=0)]
    before = lm_loss(tiny.lm, batches, pad)
    for _ in range(60):
        lm_epoch(tiny.lm, optimizer, batches, pad)
    assert lm_loss(tiny.lm, batches, pad) < 0.6 * before


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


def test_early_stopping_keeps_the_best_epochs_weights() -> None:
    stopping = EarlyStopping(patience=2)
    assert trained_metrics(stopping, [1, 3, 2, 3, float("nan"), 9, 9]) == (4, 1.0)
    assert (stopping.best, stopping.best_epoch) == (3, 1)


def test_early_stopping_quirk_keeps_the_last_epochs_weights() -> None:
    assert trained_metrics(EarlyStopping(2, REFERENCE.keep_last_weights), [1, 3, 2, 3, 0, 9]) == (4, 4.0)


def test_early_stopping_resumed_from_its_state_goes_on_as_if_never_stopped() -> None:
    model = torch.nn.Linear(1, 1)
    first = EarlyStopping(patience=1)
    first.update(0, 5.0, model)
    first.update(1, 4.0, model)
    resumed = EarlyStopping(**copy.deepcopy(first.state()))
    assert resumed.update(2, 4.0, model) is True
    assert resumed.best_epoch == 0 and resumed.weights.keys() == model.state_dict().keys()
