"""Reads and writes YAML files of users; errors are one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import yaml

from milan_ray.errors import MilanError, unknown_name


def to_yaml(record: Any, about: str) -> str:
    """Formats a dataclass as YAML that :func:`mapping` reads, below a comment."""
    return f"# {about}\n" + yaml.safe_dump(asdict(record), sort_keys=False)


def mapping(text: str, where: str, *records: type, required: Sequence[str] = ()) -> dict[str, Any]:
    """Reads YAML whose keys are fields of dataclasses.

    Args:
        text: Content of the file.
        where: Name of the file, for errors.
        *records: The dataclasses; fields without a default are required.
        required: Further required keys.

    Raises:
        MilanError: The content is not YAML, a key is unknown, or a required key is missing.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MilanError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise MilanError(f"{where} must hold lines of the form 'key: value'.")
    known_fields = [field for record in records for field in fields(record)]
    names = [*required, *(field.name for field in known_fields)]
    for key in values:
        if key not in names:
            raise unknown_name(f"key in {where}:", str(key), names, f"Known are {', '.join(names)}.")
    needed = [*required, *(field.name for field in known_fields if field.default is MISSING)]
    for key in needed:
        if key not in values:
            raise MilanError(f"{where} lacks {key!r}; it needs {', '.join(needed)}.")
    return values


def wrong(where: str, key: str, value: object, wanted: str) -> MilanError:
    """The error for an invalid value."""
    return MilanError(f"{where}: {key} must be {wanted}, not {value!r}.")


def known(kind: str, name: object, names: Sequence[str]) -> str:
    """Checks that a name is one of the known ones, and returns it.

    Raises:
        MilanError: The name is unknown.
    """
    if name not in names:
        raise unknown_name(kind, str(name), names)
    return str(name)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, key: str, where: str, wanted: str = "a number") -> float:
    """Checks that a value is a finite number, and returns it.

    Raises:
        MilanError: It is not.
    """
    if not is_number(value):
        raise wrong(where, key, value, wanted)
    return float(value)


def share(value: Any, key: str, where: str) -> float:
    """Checks that a value is a fraction strictly between 0 and 1, and returns it.

    Raises:
        MilanError: It is not.
    """
    if not is_number(value) or not 0 < value < 1:
        raise wrong(where, key, value, "a share between 0 and 1, both excluded")
    return float(value)


def whole(value: object, key: str, where: str, least: int = 1) -> int:
    """Checks that a value is a whole number, and returns it.

    Raises:
        MilanError: It is not, or is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise wrong(where, key, value, f"a whole number of at least {least}")
    return value
