"""Fitting a captioner in one's own process: the paper's defaults, what it learns, and going on from any epoch."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from milan_ray.captioner.decoder import Decoder
from milan_ray.captioner.fit import FitConfig, Sizes, epoch_line, fit, fitted, new_state, split_units
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.text import Indexer
from milan_ray.captioner.training import collate_decoder, greedy_captions, optimizer_for, token_loss
from milan_ray.config import STOP_BY, TrainingConfig

THINGS = ("dog", "cat", "house", "tree")


class Units:
    """Units whose features tell what they are annotated with."""

    def __init__(self) -> None:
        things = np.random.default_rng(0).integers(len(THINGS), size=40)
        self.texts = [[f"a small {THINGS[thing]}", f"a small {THINGS[thing]}"] for thing in things]
        self.size = len(THINGS)
        self._features = torch.eye(len(THINGS))[things][:, None].expand(-1, 3, -1)

    def take(self, rows):
        return self._features[list(rows)]


PLAN = FitConfig(
    TrainingConfig(max_epochs=6, learning_rate=0.03, decoder_batch_size=8, lm_batch_size=8), Sizes(8, 16, 0.1)
)
PLANS = {"lm": PLAN, "decoder": PLAN}


@pytest.fixture(scope="module")
def reported() -> list[dict]:
    """The state after every epoch."""
    units, states = Units(), []
    fit(units, PLANS, new_state(units.texts), lambda state: states.append(copy.deepcopy(state)))
    return states


def test_defaults_are_the_papers() -> None:
    """The reference's train_milan.py and the paper's Appendix B."""
    config, sizes = FitConfig().config, FitConfig().sizes
    assert (config.decoder_batch_size, config.lm_batch_size) == (64, 128)
    assert (config.learning_rate, config.weight_decay) == (1e-3, 1e-2)
    assert (config.max_epochs, config.patience, config.hold_out) == (100, 4, 0.1)
    assert config.regularization_weight == 1 and not config.bf16 and not config.keep_last_weights
    assert config.stop_by == "bleu"
    assert sizes == Sizes(embedding=128, hidden=512, dropout=0.5)
    lm, decoder = FitConfig().model("lm", 30, 40), FitConfig().model("decoder", 30, 40)
    assert isinstance(lm, LanguageModel) and isinstance(decoder, Decoder)
    shapes = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    assert shapes["embedding.weight"] == (34, 128) and shapes["lstm.weight_hh_l1"] == (2048, 512)
    assert "lstm.weight_hh_l2" not in shapes
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes["embedding.weight"] == (34, 128) and shapes["lstm.weight_hh"] == (2048, 512)
    assert {module.p for model in (lm, decoder) for module in model.modules() if "Dropout" in type(module).__name__} | {
        lm.lstm.dropout
    } == {0.5}
    (group,) = optimizer_for(decoder, config).param_groups
    expected = torch.optim.AdamW(decoder.parameters()).param_groups[0]
    assert {key: value for key, value in group.items() if key != "params"} == {
        key: value for key, value in expected.items() if key != "params"
    }


def test_fit_reports_every_epoch_of_both_parts_and_learns(reported) -> None:
    history = reported[-1]["history"]
    assert [(row["part"], row["epoch"]) for row in history] == [(part, i) for part in PLANS for i in range(6)]
    assert [len(state["history"]) for state in reported] == list(range(1, 13))
    assert history[0]["validation"] > history[5]["validation"]  # nats
    assert history[6]["validation"] < history[11]["validation"]  # BLEU
    assert reported[-1]["kept"]["decoder"] == max(range(6), key=lambda i: history[6 + i]["validation"])
    units = Units()
    decoder = fitted(reported[-1], "decoder", PLAN, units.size)
    assert isinstance(decoder, Decoder)
    said = greedy_captions(decoder, units.take(range(40)), Indexer.from_state(reported[-1]["indexer"]))
    assert np.mean([text.lower() in texts for text, texts in zip(said, units.texts, strict=True)]) > 0.8
    assert "held-out perplexity" in epoch_line(history[0]) and "held-out BLEU" in epoch_line(history[-1])


@pytest.mark.parametrize("epochs", [2, 6, 9])
def test_fit_goes_on_from_any_epoch_to_the_same_result(reported, epochs) -> None:
    state = copy.deepcopy(reported[epochs - 1])
    fit(Units(), PLANS, state, lambda state: None)
    assert state["history"] == reported[-1]["history"] and state["kept"] == reported[-1]["kept"]
    torch.testing.assert_close(state["finished"], reported[-1]["finished"], rtol=0, atol=0)


def test_fit_of_the_decoder_alone_is_that_of_both(reported) -> None:
    units = Units()
    state = new_state(units.texts)
    fit(units, {"decoder": PLAN}, state, lambda state: None)
    assert state["history"] == reported[-1]["history"][6:]


def test_fit_stops_by_the_loss_where_told_and_trains_the_same() -> None:
    """The first epoch with BLEU 100 is not the one with the lowest loss."""
    units, states = Units(), {}
    for stop_by in STOP_BY:
        config = replace(PLAN.config, stop_by=stop_by)
        states[stop_by] = new_state(units.texts)
        fit(units, {"decoder": FitConfig(config, PLAN.sizes)}, states[stop_by], lambda state: None)
    by_bleu, by_loss = (states[stop_by]["history"] for stop_by in STOP_BY)
    assert [row["validation"] for row in by_bleu] == [row["validation"] for row in by_loss]
    losses = [row["validation_loss"] for row in by_loss]
    assert states["loss"]["kept"]["decoder"] == min(range(6), key=losses.__getitem__)
    assert states["loss"]["kept"]["decoder"] > states["bleu"]["kept"]["decoder"]
    assert f"held-out loss {losses[-1]:.2f}, held-out BLEU" in epoch_line(by_loss[-1])
    assert "held-out loss" not in epoch_line(by_bleu[-1])

    indexer = Indexer.from_state(states["loss"]["indexer"])
    decoder = fitted(states["loss"], "decoder", PLAN, units.size).eval()
    held_out, _ = split_units(40, PLAN.config)
    texts = [units.texts[row][0] for row in held_out]  # both annotations are the same
    batch = collate_decoder(units.take(held_out), [indexer.words(indexer.tokenizer(text)) for text in texts], indexer)
    with torch.no_grad():
        expected = token_loss(decoder(batch.features, batch.targets)[0], batch.targets, indexer.ids.pad)
    assert min(losses) == pytest.approx(float(expected), rel=1e-4)


def test_fit_does_nothing_when_all_is_finished(reported) -> None:
    state = copy.deepcopy(reported[-1])
    fit(Units(), PLANS, state, lambda state: pytest.fail("an epoch too many"))
    assert state["history"] == reported[-1]["history"]


def test_split_units_depends_on_number_and_seed_alone() -> None:
    held_out, train = split_units(40, PLAN.config)
    assert len(held_out) == 4 and sorted(held_out + train) == list(range(40))
    assert split_units(40, replace(PLAN.config, max_epochs=1)) == (held_out, train)
    assert split_units(40, replace(PLAN.config, seed=1)) != (held_out, train)
