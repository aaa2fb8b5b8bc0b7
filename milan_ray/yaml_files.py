"""YAML that people write and read: what is wrong with it is one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import yaml

from milan_ray.errors import MilanError, unknown_name


def to_yaml(record: Any, about: str) -> str:
    """A dataclass as a file that :func:`mapping` reads, with a remark for people on top."""
    return f"# {about}\n" + yaml.safe_dump(asdict(record), sort_keys=False)


def mapping(text: str, where: str, *records: type, required: Sequence[str] = ()) -> dict[str, Any]:
    """Reads YAML whose keys are fields of dataclasses.

    Args:
        text: The file.
        where: Its name, for errors.
        *records: The dataclasses; fields without a default are required.
        required: Further keys.

    Raises:
        MilanError: It is no YAML, a key is unknown, or a required one is missing.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MilanError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise MilanError(f"{where} must hold lines of the form 'key: value'.")
    known_fields = [field for record in records for field in fields(record)]
    names = [*required, *(field.name for field in known_fields)]
    for key in found:
        if key not in names:
            raise unknown_name(f"key in {where}:", str(key), names, f"Known are {', '.join(names)}.")
    needed = [*required, *(field.name for field in known_fields if field.default is MISSING)]
    for key in needed:
        if key not in found:
            raise MilanError(f"{where} lacks {key!r}; it needs {', '.join(needed)}.")
    return found


def wrong(where: str, key: str, value: object, wanted: str) -> MilanError:
    """The error for a value that is not what it should be."""
    return MilanError(f"{where}: {key} must be {wanted}, not {value!r}.")


def known(kind: str, name: object, names: Sequence[str]) -> str:
    """A name that must be one of some.

    Raises:
        MilanError: It is none of them.
    """
    if name not in names:
        raise unknown_name(kind, str(name), names)
    return str(name)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, key: str, where: str, wanted: str = "a number") -> float:
    """A finite number.

    Raises:
        MilanError: It is none.
    """
    if not is_number(value):
        raise wrong(where, key, value, wanted)
    return float(value)


def share(value: Any, key: str, where: str) -> float:
    """A part of a whole that leaves something on both sides.

    Raises:
        MilanError: It is none.
    """
    if not is_number(value) or not 0 < value < 1:
        raise wrong(where, key, value, "a share between 0 and 1, both excluded")
    return float(value)


def whole(value: object, key: str, where: str, least: int = 1) -> int:
    """A whole number.

    Raises:
        MilanError: It is none, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise wrong(where, key, value, f"a whole number of at least {least}")
    return value
