"""Reads what files of features consist of, tensors and JSON, and says in one sentence what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from milan_ray.errors import MilanError, explained
from milan_ray.models.checkpoints import Checkpoint, read_checkpoint
from milan_ray.models.features.dictionary import NORMALISATIONS, Weights

_LARGEST = 2**24
"""Most bytes of JSON that are read: configurations have a few thousand."""


class Tensors:
    """The tensors of a file, which are handed out as float32 and checked.

    Args:
        path: The file, for messages.
        tensors: Names → tensors.
    """

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the file's order."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            MilanError: It is missing.
        """
        return tuple(self._find(name).shape)

    def matrix(self, name: str) -> torch.Tensor:
        """A matrix with rows and columns.

        Raises:
            MilanError: It is missing, no matrix, or holds something else than numbers.
        """
        if len(self.shape(name)) != 2 or not self._find(name).numel():
            raise self.problem(f"its tensor {name} has the shape {self.shape(name)}, which is no matrix")
        return self._numbers(name)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of a given shape.

        Raises:
            MilanError: It is missing, of another shape, or holds something else than numbers.
        """
        if self.shape(name) != shape:
            raise self.problem(f"its tensor {name} has the shape {self.shape(name)} and not {shape}")
        return self._numbers(name)

    def optional(self, name: str, *shape: int) -> torch.Tensor | None:
        """As :meth:`tensor`; None where it is missing."""
        return self.tensor(name, *shape) if name in self else None

    def number(self, name: str) -> float:
        """A tensor of one number.

        Raises:
            MilanError: It is missing, or holds something else.
        """
        if self._find(name).numel() != 1:
            raise self.problem(f"its tensor {name} has the shape {self.shape(name)} and not one number")
        return float(self._numbers(name).reshape(()))

    def problem(self, what: str) -> MilanError:
        """The error for a file whose content is wrong."""
        return MilanError(f"features {self.path} cannot be read, because {what}: fetch or save them again.")

    def _find(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            there = ", ".join(self.names[:8]) or "none"
            raise self.problem(f"they lack the tensor {name} (there are {there})")
        return self._tensors[name]

    def _numbers(self, name: str) -> torch.Tensor:
        tensor = self._find(name)
        if (
            tensor.is_complex()
            or tensor.dtype == torch.bool
            or tensor.dtype.itemsize < 2
            or tensor.layout != torch.strided
        ):
            raise self.problem(f"its tensor {name} holds {tensor.dtype}")
        numbers = tensor.detach().to(torch.float32)
        # A threshold of ∞ switches a feature off.
        if bool((numbers.isnan() if "threshold" in name else ~numbers.isfinite()).any()):
            raise self.problem(f"its tensor {name} has NaN or infinite numbers")
        return numbers


class Config:
    """A configuration in JSON, whose entries are checked.

    Args:
        path: The file, for messages.
        entries: Its content.
    """

    def __init__(self, path: str, entries: Mapping[str, Any]) -> None:
        self.path = path
        self.entries = dict(entries)

    def text(self, *names: str) -> str | None:
        """The first of some entries that is there, a text; None where all are missing or null."""
        value = self._first(names)
        if value is not None and not isinstance(value, str):
            raise self.wrong(names[0], value)
        return value

    def integer(self, *names: str) -> int | None:
        """The first of some entries that is there, a positive integer; None where all are missing or null."""
        value = self._first(names)
        if value is not None and (type(value) is not int or value < 1):
            raise self.wrong(names[0], value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """An entry, true or false."""
        value = self._first((name,))
        if value is not None and type(value) is not bool:
            raise self.wrong(name, value)
        return default if value is None else value

    def inner(self, name: str) -> Config:
        """An entry with entries of its own; empty where it is missing or null."""
        value = self._first((name,))
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value)
        return Config(self.path, value or {})

    def _first(self, names: Iterable[str]) -> Any:
        return next((self.entries[name] for name in names if self.entries.get(name) is not None), None)

    def wrong(self, name: str, value: object) -> MilanError:
        """The error for an entry that is not what it should be."""
        shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
        return MilanError(
            f"{self.path} cannot be used, because its entry {name} is {shown}: correct it, or fetch the folder again."
        )


def read_config(path: str | Path) -> Config:
    """Reads a configuration in JSON.

    Raises:
        MilanError: It is missing, damaged, or no configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise MilanError(f"features lack their configuration {path}: fetch the whole folder again.")
    with explained(f"{path} cannot be read", "fetch the folder again.", OSError, ValueError, RecursionError):
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large for a configuration")
        return parse_config(str(path), path.read_bytes())


def parse_config(path: str, text: bytes) -> Config:
    """A configuration in JSON that was read already.

    Raises:
        ValueError: It is damaged, or no configuration.
        RecursionError: It is nested without an end.
    """
    content = json.loads(text.decode())
    if not isinstance(content, dict):
        raise ValueError("it holds no entries with names")
    return Config(path, content)


def read_tensors(path: str | Path, *needed: str) -> Tensors:
    """Reads the tensors of a file of safetensors or ``torch.save``; nothing in it is executed.

    Args:
        path: The file.
        *needed: Where the file holds several state dicts, names that the right one has.

    Raises:
        MilanError: The file is missing or damaged, or holds no tensors, or several such state dicts.
    """
    return tensors_of(read_checkpoint(str(path)), *needed)


def tensors_of(checkpoint: Checkpoint, *needed: str) -> Tensors:
    """The tensors of a checkpoint; see :func:`read_tensors`."""
    fitting = [state for state in checkpoint.states if all(name in state.shapes for name in needed)]
    if not fitting:
        there = ", ".join(list(checkpoint.states[0].shapes)[:8])
        raise MilanError(
            f"features {checkpoint.path} cannot be read, because they lack the tensors {', '.join(needed)} (there are "
            f"{there}): give another file, or say its format."
        )
    if len(fitting) > 1:
        where = ", ".join(state.address or "the outermost" for state in fitting[:4])
        raise MilanError(f"features {checkpoint.path} hold several dictionaries ({where}): save one of them alone.")
    with explained(f"features {checkpoint.path} cannot be read", "fetch or save them again."):
        return Tensors(checkpoint.path, fitting[0].tensors())


def first(*values: int | None) -> int | None:
    """The first number that is there."""
    return next((value for value in values if value is not None), None)


def ask(path: str, what: str, option: str, values: str) -> MilanError:
    """The error for what a file does not say and a user has to.

    Args:
        path: The file.
        what: What is not said, as the end of "does not say".
        option: The option of :class:`~milan_ray.models.features.options.ReadingOptions`.
        values: Its possible values.
    """
    return MilanError(f"features {path} do not say {what}: give {option} ({values}).")


def check_k(path: str, k: int | None, count: int) -> int:
    """The number of features that a TopK activation keeps.

    Raises:
        MilanError: It is not known, or there are fewer features.
    """
    if k is None:
        raise ask(path, "how many features TopK keeps at a position", "k", f"1 to {count}")
    if not 1 <= k <= count:
        raise MilanError(f"features {path} keep k = {k} features of {count}: give k, 1 to {count}.")
    return k


def check_normalisation(path: str, name: str | None) -> str:
    """The name of a normalisation, which must be known.

    Raises:
        MilanError: It is not.
    """
    if name is None:
        raise ask(path, "how they normalise a layer's output", "normalisation", ", ".join(NORMALISATIONS))
    if name not in NORMALISATIONS:
        raise MilanError(
            f"features {path} have the normalisation {name!r}, which is not known: give normalisation "
            f"({', '.join(NORMALISATIONS)})."
        )
    return name


def unknown(path: str, kind: str, name: object, known: Iterable[str], option: str | None = None) -> MilanError:
    """The error for an architecture or activation that is not known.

    Args:
        path: The file.
        kind: What it is.
        name: Its name.
        known: The names that are known.
        option: The option that chooses another; None where there is none.
    """
    choice = f"give {option}, one of {', '.join(known)}" if option else f"known are {', '.join(known)}"
    return MilanError(f"features {path} have the {kind} {name!r}, which is not read: {choice}.")


def common_weights(tensors: Tensors, subtract: bool) -> Weights:
    """The weights that most projects store: ``W_enc`` (C, F), ``W_dec`` (F, C), ``b_dec`` (C,), ``b_enc`` (F,).

    Args:
        tensors: The file's tensors; ``b_enc`` may be missing, as in gated dictionaries.
        subtract: Whether ``b_dec`` is subtracted from the input.

    Raises:
        MilanError: One is missing, damaged, or of another shape.
    """
    encoder = tensors.matrix("W_enc").T.contiguous()
    count, width = encoder.shape
    bias = tensors.tensor("b_dec", width)
    return Weights(
        encoder,
        tensors.tensor("W_dec", count, width),
        encoder_bias=tensors.optional("b_enc", count),
        decoder_bias=bias,
        input_bias=bias if subtract else None,
    )


def with_bias(tensors: Tensors, weights: Weights) -> Weights:
    """The weights, whose encoder must have a bias.

    Raises:
        MilanError: It has none.
    """
    if weights.encoder_bias is None:
        tensors.tensor("b_enc", len(weights.encoder))
    return weights


def gated_weights(tensors: Tensors, weights: Weights, gate: str, magnitude: str, gain: str) -> Weights:
    """The weights of a gated dictionary.

    Args:
        tensors: The file's tensors.
        weights: Those that other dictionaries have, too.
        gate: Name of the bias of the gates, (F,).
        magnitude: Name of the bias of the magnitudes, (F,).
        gain: Name of the logarithm of the magnitudes' factor, (F,).

    Raises:
        MilanError: One is missing, damaged, or of another shape.
    """
    count = len(weights.encoder)
    return replace(
        weights,
        encoder_bias=tensors.tensor(magnitude, count),
        gate_bias=tensors.tensor(gate, count),
        log_gain=tensors.tensor(gain, count),
    )
