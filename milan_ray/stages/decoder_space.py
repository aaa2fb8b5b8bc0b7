"""Searching how to train a decoder: what there is to try, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from milan_ray.captioner.fit import Plan, Sizes
from milan_ray.config import TrainingConfig
from milan_ray.yaml_files import known, mapping, number, share, whole, wrong

SEARCHERS = AUTO, OPTUNA, RANDOM = ("auto", "optuna", "random")
"""auto is Optuna where it is installed, else Ray Tune's own random search."""

ENDINGS = PATIENCE, EPOCHS, ASHA = ("patience", "epochs", "asha")
"""Why a trial ended: no improvement, all epochs done, or worse than others by then."""

KIND = "decoder"
"""What the key ``tunes`` of such a file says."""


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number between two, both included; drawn evenly on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False


_PAPER = Plan()


@dataclass(frozen=True)
class DecoderSetting:
    """How to train a decoder: what the search chooses and training takes; defaults are the paper's.

    Attributes:
        learning_rate: AdamW's.
        embedding: Token embeddings.
        hidden: LSTM states.
        dropout: While training.
        regularization_weight: Weight of the doubly-stochastic attention regulariser.
        encoder: Name of the image encoder whose encodings are read.
    """

    learning_rate: float = _PAPER.config.learning_rate
    embedding: int = _PAPER.sizes.embedding
    hidden: int = _PAPER.sizes.hidden
    dropout: float = _PAPER.sizes.dropout
    regularization_weight: float = _PAPER.config.regularization_weight
    encoder: str = "resnet101"

    def plan(self, plan: Plan) -> Plan:
        """Another plan with these values in it."""
        config = replace(
            plan.config, learning_rate=self.learning_rate, regularization_weight=self.regularization_weight
        )
        return Plan(config, Sizes(self.embedding, self.hidden, self.dropout))


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
    """How long to search, and how.

    Attributes:
        trials: Settings to try.
        epochs: Epochs at most of each.
        patience: Epochs without improvement that are forgiven; the next one ends the trial.
        grace: Epochs before a trial may be stopped for being worse than others (ASHA).
        reduction: Of so many trials that got as far, one may go on.
        searcher: Of :data:`SEARCHERS`.
        hold_out: Share of units that judge.
        seed: Of the draws, the weights and the units held out.
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
        """What is the same for all trials; it trains as ``jobs.train`` does with these options."""
        return replace(
            _PAPER.config, max_epochs=self.epochs, patience=self.patience, hold_out=self.hold_out, seed=self.seed
        )


@dataclass(frozen=True)
class DecoderSpace:
    """What to try.

    Attributes:
        space: Key of :class:`DecoderSetting` → what to draw it from; what is left out keeps the paper's value.
        budget: How long, and how.
    """

    space: Mapping[str, Choices | Range]
    budget: Budget = Budget()

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders whose encodings are read."""
        of = self.space.get("encoder", Choices((DecoderSetting.encoder,)))
        assert isinstance(of, Choices)
        return of.values


def tunes_decoder(text: str) -> bool:
    """Whether a file holds such a space, rather than a sweep of ways to decode."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return False  # whoever reads it as a sweep says what is wrong
    return isinstance(found, dict) and "tunes" in found


def read_decoder_space(text: str, where: str) -> DecoderSpace:
    """Reads a search space.

    Args:
        text: YAML: ``tunes: decoder``, keys of :class:`DecoderSetting` with a value, a list of values, or
            ``{from: 1.0e-4, to: 1.0e-2, log: true}``, and the fields of :class:`Budget`.
        where: Name of the file, for errors.

    Raises:
        MilanError: It is no YAML, or a key or value is not what it should be.
    """
    given = mapping(text, where, DecoderSetting, Budget, required=("tunes",))
    known(f"value of tunes in {where}:", given.pop("tunes"), [KIND])
    space = {}
    for field in fields(DecoderSetting):
        if field.name in given:
            space[field.name] = _drawn_from(given.pop(field.name), field.name, where)
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key == "searcher":
            read[key] = known(f"searcher in {where}:", value, SEARCHERS)
        elif key == "hold_out":
            read[key] = share(value, key, where)
        else:
            read[key] = whole(value, key, where, {"seed": 0, "patience": 0, "reduction": 2}.get(key, 1))
    return DecoderSpace(space, Budget(**read))


def read_decoder_setting(text: str, where: str) -> DecoderSetting:
    """Reads a setting; keys left out have the paper's values. Arguments and errors as :func:`read_decoder_space`."""
    given = mapping(text, where, DecoderSetting)
    return DecoderSetting(**{key: _value(value, key, where) for key, value in given.items()})


def _drawn_from(value: object, key: str, where: str) -> Choices | Range:
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
    return Choices(tuple(dict.fromkeys(_value(one, key, where) for one in values)))


def _value(value: object, key: str, where: str) -> Any:
    if key == "encoder":
        if not isinstance(value, str) or not value:
            raise wrong(where, key, value, _wanted(key))
        return value
    found = whole(value, key, where) if key in _WHOLE else number(value, key, where, _wanted(key))
    low, high = _LIMITS[key]
    if not low <= found <= high:
        raise wrong(where, key, value, f"between {low:g} and {high:g}")
    return found


def _wanted(key: str) -> str:
    if key == "encoder":
        return "the name of an encoder, or a list of names"
    if key in _WHOLE:
        return "a whole number, or a list of them"
    return "a number (YAML wants 1.0e-3, not 1e-3), a list of numbers, or {from: …, to: …, log: true or false}"
