"""Options that would do nothing: refused in one sentence, because nobody looks twice at what was ignored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from milan_ray.errors import MilanError

DISSECTION = (
    "labels",
    "image_column",
    "label_column",
    "max_bad",
    "weights",
    "activations",
    "units_axis",
    "batch_axis",
    "layer_grid",
    "prefix_tokens",
    "k",
    "quantile",
    "batch_size",
    "shard_size",
    "precision",
    "channels_last",
    "pooled",
)
"""Options, by destination, that say how models are dissected."""

CLUSTER = ("address", "actors", "cpus_per_actor", "gpus_per_actor", "device")
"""Options, by destination, that say where and with how much work is done."""


def given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of these options that were given, as they were written, on the command line or in the file of --config.

    Args:
        args: What :meth:`milan_ray.cli.parsing.Parser.read` has read; of other namespaces nothing counts as given.
        names: Options by destination.
    """
    written: dict[str, str] = getattr(args, "given", {})
    return [written[name] for name in names if name in written]


def refuse(args: argparse.Namespace, names: Sequence[str], why: str, remedy: str) -> None:
    """Refuses options that would do nothing.

    Args:
        args: The verb's options.
        names: Options by destination.
        why: Why they would, as ``without --probe``.
        remedy: What to do instead, as ``give --probe too``.

    Raises:
        MilanError: One of them was given.
    """
    found = given(args, names)
    if found:
        them = "them" if len(found) > 1 else "it"
        raise MilanError(f"{why} {', '.join(found)} would do nothing: {remedy}, or leave {them} out.")


def check(args: argparse.Namespace) -> None:
    """Refuses what does nothing in any verb that has it.

    Raises:
        MilanError: There is such an option.
    """
    if getattr(args, "no_report", False) and args.verb != "paper":  # whose own page goes there all the same
        refuse(args, ["report"], "with --no-report", "leave out --no-report")
    if getattr(args, "clip_z", None) is not None and args.clip is None and not _reranked(args):
        refuse(args, ["clip_z", "clip_beam_size", "clip_lam"], "without --clip", "give --clip too")


def _reranked(args: argparse.Namespace) -> bool:
    return any((getattr(args, name, None) or "").endswith("+clip") for name in ("milan", "decoder"))
