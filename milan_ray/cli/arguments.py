"""Declares arguments of one kind each, and the types of their values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from milan_ray.errors import MilanError
from milan_ray.names import checked_name

Parser = argparse._ActionsContainer
"""Where an argument is added: a subcommand's parser, or a group of its arguments."""


def flag(parser: Parser, name: str, about: str) -> None:
    """Adds an option without a value, which is off by default."""
    parser.add_argument(name, action="store_true", help=about)


def integer(parser: Parser, name: str, default: int | None, about: str, least: int | None = 1) -> None:
    """Adds an option that takes an integer of at least 1, of at least 0, or any (None)."""
    kinds: dict[int | None, Callable[[str], int]] = {1: positive, 0: count, None: int}
    parser.add_argument(name, type=kinds[least], default=default, metavar="N", help=about)


def fraction(parser: Parser, name: str, default: float, about: str) -> None:
    """Adds an option that takes a number between 0 and 1."""
    parser.add_argument(name, type=share, default=default, metavar="SHARE", help=about)


def number(parser: Parser, name: str, default: float | None, about: str, kind: Callable[[str], float] = float) -> None:
    """Adds an option that takes a number."""
    parser.add_argument(name, type=kind, default=default, metavar="N", help=about)


def string(parser: Parser, name: str, metavar: str, about: str, default: Any = None, **more: Any) -> None:
    """Adds an option or a positional argument that takes one string; ``more`` as for ``add_argument``."""
    parser.add_argument(name, metavar=metavar, help=about, default=default, **more)


def strings(parser: Parser, name: str, metavar: str, about: str, default: Any = None, **more: Any) -> None:
    """Adds an option or a positional argument that takes one or more strings; ``more`` as for ``add_argument``."""
    parser.add_argument(name, nargs="+", metavar=metavar, help=about, default=default, **more)


def choice(parser: Parser, name: str, choices: Sequence[str], about: str, default: str | None = None) -> None:
    """Adds an option that takes one of a few words."""
    parser.add_argument(name, choices=choices, default=default, help=about)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, except empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", [], ()):  # 0 == False
            return action.help
        return super()._get_help_string(action)


def amount(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0")
    return number


def device(text: str) -> str:
    """Argument type: a kind of device. Whether it exists is checked on the machine that computes."""
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu and cuda")
    return text


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def count(text: str) -> int:
    """Argument type: an integer of at least 0, such as a count or a seed."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return number


def share(text: str) -> float:
    """Argument type: a number between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def gib(text: str) -> int:
    """Argument type: a size in GiB, converted to bytes."""
    return int(float(text) * 2**30)


def numbers(text: str) -> tuple[int, ...]:
    """Argument type: a selection of units by numbers and ranges."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))


def name(text: str) -> str:
    """Argument type: a name that is used as a folder name."""
    return _checked(text, slashes=False)


def table_name(text: str) -> str:
    """Argument type: a name that tables are stored under; like a model's name, it may contain slashes."""
    return _checked(text, slashes=True)


def tag(text: str) -> str:
    """Argument type: a suffix of a labeler's name; empty for none."""
    return text and name(text)


def _checked(text: str, slashes: bool) -> str:
    try:
        return checked_name("it", text, slashes=slashes)
    except MilanError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".").replace("%", "%%")) from error


def grid(text: str) -> tuple[int, int]:
    """Argument type: height and width."""
    height, _, width = text.lower().partition("x")
    return positive(height), positive(width)


def names(text: str) -> list[str]:
    """Argument type: names with commas between."""
    return text.split(",")


def words(text: str) -> list[str]:
    """Argument type: words with commas between; empty ones are left out."""
    return [word.strip() for word in text.split(",") if word.strip()]
