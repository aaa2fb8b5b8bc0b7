"""What there is to try when a decoder is trained, and the choice, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from milan_ray.captioner.fit import FitConfig, Sizes
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.stages.decoder_space import (
    Budget,
    Choices,
    DecoderSetting,
    Range,
    read_decoder_setting,
    read_decoder_space,
    tunes_decoder,
)
from milan_ray.yaml_files import to_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "tune_configs"
TUNES = "tunes: decoder\n"


def test_the_shipped_space_has_all_that_there_is_to_try() -> None:
    space = read_decoder_space((CONFIGS / "decoder.yaml").read_text(encoding="utf-8"), "decoder.yaml")
    assert set(space.space) == set(vars(DecoderSetting()))
    assert space.space["learning_rate"] == Range(1e-4, 1e-2, log=True)
    assert space.space["hidden"] == Choices((256, 512, 1024)) and len(space.encoders) == 2
    assert space.budget.config == TrainingConfig()


def test_only_what_is_given_is_tried() -> None:
    space = read_decoder_space(TUNES + "dropout: [0.3, 0.5, 0.3]\nhidden: 64\nepochs: 3\n", "s.yaml")
    assert space.space == {"dropout": Choices((0.3, 0.5)), "hidden": Choices((64,))}
    assert space.budget == Budget(epochs=3) and space.encoders == ("resnet101",)


def test_files_tell_what_they_tune() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml") if tunes_decoder(path.read_text(encoding="utf-8"))} == {
        "decoder"
    }
    assert not tunes_decoder("a: [")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hidden: [3]", "lacks 'tunes'"),
        ("tunes: encoder", "unknown value of tunes in c.yaml: 'encoder'; nearest: decoder"),
        (TUNES + "hiden: 3", "unknown key in c.yaml: 'hiden'; nearest: hidden"),
        (TUNES + "hidden: 3.5", "hidden must be a whole number"),
        (TUNES + "hidden: {from: 1, to: 9}", "hidden must be a whole number, or a list of them"),
        (TUNES + "learning_rate: 1e-3", "YAML wants 1.0e-3"),
        (TUNES + "learning_rate: []", "learning_rate must be a number"),
        (TUNES + "learning_rate: {from: 1, too: 2}", "learning_rate must be a number"),
        (TUNES + "learning_rate: {from: 0.1, to: 0.01}", "from a smaller to a larger"),
        (TUNES + "regularization_weight: {from: 0, to: 1, log: true}", "above 0 where log is true"),
        (TUNES + "dropout: 1.5", "dropout must be between 0 and 0.99"),
        (TUNES + "encoder: [3]", "encoder must be the name of an encoder"),
        (TUNES + "searcher: grid", "unknown searcher in c.yaml: 'grid'"),
        (TUNES + "reduction: 1", "reduction must be a whole number of at least 2"),
        (TUNES + "hold_out: 1", "hold_out must be a share"),
    ],
)
def test_a_bad_space_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(MilanError) as error:
        read_decoder_space(text, "c.yaml")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_setting_is_read_as_it_was_written_and_changes_a_plan() -> None:
    setting = DecoderSetting(0.0005, 64, 256, 0.25, 0.5, "resnet50")
    assert read_decoder_setting(to_yaml(setting, "chosen by nobody"), "s.yaml") == setting
    assert read_decoder_setting("hidden: 64", "s.yaml") == DecoderSetting(hidden=64)
    plan = setting.plan(FitConfig(TrainingConfig(seed=3, max_epochs=7)))
    assert plan.sizes == Sizes(64, 256, 0.25)
    assert plan.config == TrainingConfig(seed=3, max_epochs=7, learning_rate=0.0005, regularization_weight=0.5)
    assert DecoderSetting().plan(FitConfig()) == FitConfig()
    with pytest.raises(MilanError, match=r"s\.yaml: dropout must be a number"):
        read_decoder_setting("dropout: much", "s.yaml")
    with pytest.raises(MilanError, match=r"unknown key in s\.yaml: 'lam'"):
        read_decoder_setting("lam: 0.2", "s.yaml")
