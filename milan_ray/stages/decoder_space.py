"""The search space and the setting of decoder tuning, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from milan_ray.captioner.fit import FitConfig, Sizes
from milan_ray.config import TrainingConfig
from milan_ray.yaml_files import known, mapping, number, share, whole, wrong

SEARCHERS = AUTO, OPTUNA, RANDOM = ("auto", "optuna", "random")
"""Search algorithms; auto is Optuna where it is installed, else Ray Tune's random search."""

ENDINGS = PATIENCE, EPOCHS, ASHA = ("patience", "epochs", "asha")
"""Why a trial ended: no more improvement, all epochs done, or stopped because others were better."""

KIND = "decoder"
"""Value of the key ``tunes`` in the file of a search space."""


@dataclass(frozen=True)
class Choices:
    """A list of values to choose from."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A range of numbers, ends included; sampled on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False


_PAPER = FitConfig()


@dataclass(frozen=True)
class DecoderSetting:
    """How to train a decoder, as tuning chooses it and training takes it; defaults are the paper's.

    Attributes:
        learning_rate: Learning rate of AdamW.
        embedding: Size of a token's embedding.
        hidden: Size of an LSTM state.
        dropout: Dropout probability during training.
        regularization_weight: Weight of the doubly-stochastic attention regulariser.
        encoder: Name of the image encoder whose encodings are read.
    """

    learning_rate: float = _PAPER.config.learning_rate
    embedding: int = _PAPER.sizes.embedding
    hidden: int = _PAPER.sizes.hidden
    dropout: float = _PAPER.sizes.dropout
    regularization_weight: float = _PAPER.config.regularization_weight
    encoder: str = "resnet101"

    def plan(self, plan: FitConfig) -> FitConfig:
        """A training plan with this setting's values."""
        config = replace(
            plan.config, learning_rate=self.learning_rate, regularization_weight=self.regularization_weight
        )
        return FitConfig(config, Sizes(self.embedding, self.hidden, self.dropout))


_LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-8, 10),
    "embedding": (1, 2**16),
    "hidden": (1, 2**16),
    "dropout": (0, 0.99),
    "regularization_weight": (0, 1e6),
}
_WHOLE = ("embedding", "hidden")


@dataclass(frozen=True)
class Budget:
    """Length and method of a search.

    Attributes:
        trials: Number of settings to try.
        epochs: Maximum number of epochs of a trial.
        patience: Epochs without improvement that are tolerated; the next one ends the trial.
        grace: Epochs before a trial may be stopped because others are better (ASHA).
        reduction: At each halving, one trial in this many continues.
        searcher: Of :data:`SEARCHERS`.
        hold_out: Share of units held out for validation.
        seed: Seed of the samples, the weights and the held-out units.
    """

    trials: int = 20
    epochs: int = _PAPER.config.max_epochs
    patience: int = _PAPER.config.patience
    grace: int = 4
    reduction: int = 3
    searcher: str = AUTO
    hold_out: float = _PAPER.config.hold_out
    seed: int = _PAPER.config.seed

    @property
    def config(self) -> TrainingConfig:
        """Hyperparameters that all trials share; ``jobs.train`` with the same options trains the same way."""
        return replace(
            _PAPER.config, max_epochs=self.epochs, patience=self.patience, hold_out=self.hold_out, seed=self.seed
        )


@dataclass(frozen=True)
class DecoderSpace:
    """A search space.

    Attributes:
        space: Key of :class:`DecoderSetting` → its values; other keys have the paper's value.
        budget: Length and method of the search.
    """

    space: Mapping[str, Choices | Range]
    budget: Budget = Budget()

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders whose encodings are read."""
        encoders = self.space.get("encoder", Choices((DecoderSetting.encoder,)))
        assert isinstance(encoders, Choices)
        return encoders.values


def tunes_decoder(text: str) -> bool:
    """Whether a file holds a search space of decoder training, rather than a sweep of decoding settings."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return False  # reading it as a sweep raises the error
    return isinstance(content, dict) and "tunes" in content


def read_decoder_space(text: str, where: str) -> DecoderSpace:
    """Reads a search space.

    Args:
        text: YAML: ``tunes: decoder``, keys of :class:`DecoderSetting` with a value, a list of values, or
            ``{from: 1.0e-4, to: 1.0e-2, log: true}``, and the fields of :class:`Budget`.
        where: Name of the file, for errors.

    Raises:
        MilanError: The text is not YAML, or a key or a value is invalid.
    """
    given = mapping(text, where, DecoderSetting, Budget, required=("tunes",))
    known(f"value of tunes in {where}:", given.pop("tunes"), [KIND])
    space = {}
    for field in fields(DecoderSetting):
        if field.name in given:
            space[field.name] = _values(given.pop(field.name), field.name, where)
    budget: dict[str, Any] = {}
    for key, value in given.items():
        if key == "searcher":
            budget[key] = known(f"searcher in {where}:", value, SEARCHERS)
        elif key == "hold_out":
            budget[key] = share(value, key, where)
        else:
            budget[key] = whole(value, key, where, {"seed": 0, "patience": 0, "reduction": 2}.get(key, 1))
    return DecoderSpace(space, Budget(**budget))


def read_decoder_setting(text: str, where: str) -> DecoderSetting:
    """Reads a setting; missing keys have the paper's values. Arguments and errors as :func:`read_decoder_space`."""
    given = mapping(text, where, DecoderSetting)
    return DecoderSetting(**{key: _value(value, key, where) for key, value in given.items()})


def _values(value: object, key: str, where: str) -> Choices | Range:
    """The values of a key: a range, a list, or a single one."""
    if isinstance(value, dict):
        numbers = key not in (*_WHOLE, "encoder")
        ends = [value.get(end) for end in ("from", "to")]
        log = value.get("log", False)
        if not numbers or set(value) - {"from", "to", "log"} or not isinstance(log, bool):
            raise wrong(where, key, value, _wanted(key))
        low, high = (_value(end, key, where) for end in ends)
        if not low < high or (log and low <= 0):
            raise wrong(where, key, value, "a range from a smaller to a larger number, above 0 where log is true")
        return Range(low, high, log)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise wrong(where, key, value, _wanted(key))
    return Choices(tuple(dict.fromkeys(_value(item, key, where) for item in values)))


def _value(value: object, key: str, where: str) -> Any:
    """A single checked value of a key."""
    if key == "encoder":
        if not isinstance(value, str) or not value:
            raise wrong(where, key, value, _wanted(key))
        return value
    checked = whole(value, key, where) if key in _WHOLE else number(value, key, where, _wanted(key))
    low, high = _LIMITS[key]
    if not low <= checked <= high:
        raise wrong(where, key, value, f"between {low:g} and {high:g}")
    return checked


def _wanted(key: str) -> str:
    """The valid values of a key, for errors."""
    if key == "encoder":
        return "the name of an encoder, or a list of names"
    if key in _WHOLE:
        return "a whole number, or a list of them"
    return "a number (YAML wants 1.0e-3, not 1e-3), a list of numbers, or {from: …, to: …, log: true or false}"
