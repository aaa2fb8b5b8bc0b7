import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import load_reference
from milan_ray.captioner.quirks import REFERENCE
from milan_ray.captioner.training import (
    EarlyStopping,
    attention_regularizer,
    collate_decoder,
    collate_lm,
    decoder_epoch,
    optimizer_for,
    token_loss,
)
from milan_ray.config import TrainingConfig


@pytest.fixture
def captioner(golden: Path) -> Captioner:
    """A fresh copy with dropout off: the golden losses are those of eval mode."""
    return load_reference(golden / "milan-toy.pth")


@pytest.fixture(scope="module")
def record(golden: Path) -> dict:
    return json.loads((golden / "loss/loss.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "loss/loss.npz") as file:
        return dict(file)


def assert_close(ours: torch.Tensor, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=0, atol=1e-4)


def batch_of(captioner: Captioner, record: dict) -> list[list[int]]:
    tokens = [captioner.indexer.tokenizer(text) for text in record["captions"]]
    return [captioner.indexer.words(text) for text in tokens]


def test_decoder_golden_loss_and_gradients_agree(captioner: Captioner, record: dict, arrays: dict) -> None:
    batch = collate_decoder(torch.from_numpy(arrays["features"]), batch_of(captioner, record), captioner.indexer)
    assert batch.targets.tolist() == arrays["targets"].tolist()
    log_probs, attentions = captioner.decoder(batch.features, batch.targets)
    nll = token_loss(log_probs, batch.targets, captioner.indexer.ids.pad)
    regularizer = attention_regularizer(attentions)
    (nll + regularizer).backward()
    assert nll.item() == pytest.approx(record["nll"], abs=1e-4)
    assert regularizer.item() == pytest.approx(record["regularizer"], abs=1e-4)
    parameters = dict(captioner.decoder.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert gradients.keys() == parameters.keys()
    assert {name: g.norm().item() for name, g in gradients.items()} == pytest.approx(record["grad_norms"], abs=1e-4)
    for name, reference in arrays.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], reference)


def test_decoder_epoch_golden_batch_one_adamw_step_agrees(captioner: Captioner, record: dict, arrays: dict) -> None:
    batch = collate_decoder(torch.from_numpy(arrays["features"]), batch_of(captioner, record), captioner.indexer)
    decoder = captioner.decoder
    dropout = decoder.output[0]
    assert isinstance(dropout, torch.nn.Dropout)
    dropout.p = 0.0
    config = TrainingConfig()
    loss = decoder_epoch(decoder, optimizer_for(decoder, config), [batch], captioner.indexer.ids.pad, config)
    assert loss == pytest.approx(record["loss"], abs=1e-4)
    for name, reference in arrays.items():
        if name.startswith("adamw1."):
            assert_close(dict(decoder.named_parameters())[name.removeprefix("adamw1.")], reference)


def test_language_model_golden_loss_and_gradients_agree(captioner: Captioner, record: dict, arrays: dict) -> None:
    batch = collate_lm(batch_of(captioner, record), captioner.indexer)
    assert batch.inputs.tolist() == arrays["lm_inputs"].tolist()
    assert batch.targets.tolist() == arrays["lm_targets"].tolist()
    assert captioner.lm is not None
    loss = token_loss(captioner.lm(batch.inputs), batch.targets, captioner.indexer.ids.pad)
    loss.backward()
    assert loss.item() == pytest.approx(record["lm_loss"], abs=1e-4)
    parameters = dict(captioner.lm.named_parameters())
    norms = {name: each.grad.norm().item() for name, each in parameters.items() if each.grad is not None}
    assert norms == pytest.approx(record["lm_grad_norms"], abs=1e-4)


def test_early_stopping_golden_log_stops_where_the_reference_does_and_keeps_what_it_returns(record: dict) -> None:
    probe = record["early_stopping_probe"]
    losses = [float(re.findall(r"val_loss=([\d.]+)", line)[0]) for line in probe["log"]]
    kept = {}
    for keep_last in (REFERENCE.keep_last_weights, False):
        model, stopping = torch.nn.Linear(1, 1, bias=False), EarlyStopping(patience=2, keep_last=keep_last)
        for epoch, loss in enumerate(losses):
            torch.nn.init.constant_(model.weight, loss)  # stands for the weights that have this loss
            if stopping.update(epoch, -loss, model):
                break
        assert epoch == len(losses) - 1
        stopping.restore(model)
        kept[keep_last] = model.weight.item()
    assert kept[True] == pytest.approx(probe["val_loss_of_returned_model"], abs=1e-3)
    assert kept[False] == pytest.approx(min(losses)) != pytest.approx(kept[True])
