"""Rejects options that would have no effect, because users would not notice that they were ignored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from milan_ray.errors import MilanError

DISSECTION = (
    "labels", "image_column", "label_column", "max_bad", "weights", "features", "activations", "units_axis",
    "batch_axis", "layer_grid", "prefix_tokens", "k", "quantile", "batch_size", "shard_size", "precision",
    "channels_last", "pooled",
)  # fmt: skip
"""Destinations of the options on how models are dissected."""

CLUSTER = ("address", "actors", "cpus_per_actor", "gpus_per_actor", "device")
"""Destinations of the options on the cluster and its resources."""


def given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Returns those of the options that were given, as written on the command line or in the file of ``--config``.

    Args:
        args: The result of :meth:`milan_ray.cli.parsing.Parser.read`; in other namespaces, no option counts as given.
        names: Options by destination.
    """
    written: dict[str, str] = getattr(args, "given", {})
    return [written[name] for name in names if name in written]


def refuse(args: argparse.Namespace, names: Sequence[str], why: str, remedy: str) -> None:
    """Rejects options that would have no effect.

    Args:
        args: The subcommand's options.
        names: Options by destination.
        why: Why they have no effect, e.g. ``without --probe``.
        remedy: What to do instead, e.g. ``give --probe too``.

    Raises:
        MilanError: One of the options was given.
    """
    names_given = given(args, names)
    if names_given:
        them = "them" if len(names_given) > 1 else "it"
        raise MilanError(f"{why} {', '.join(names_given)} would do nothing: {remedy}, or leave {them} out.")


def check(args: argparse.Namespace) -> None:
    """Rejects options that would have no effect in any subcommand that has them.

    Raises:
        MilanError: Such an option was given.
    """
    if getattr(args, "no_report", False) and args.verb != "paper":  # which writes its own page to --report anyway
        refuse(args, ["report"], "with --no-report", "leave out --no-report")
    if getattr(args, "clip_z", None) is not None and args.clip is None and not _reranked(args):
        refuse(args, ["clip_z", "clip_beam_size", "clip_lam", "clip_gamma"], "without --clip", "give --clip too")


def _reranked(args: argparse.Namespace) -> bool:
    return any((getattr(args, name, None) or "").endswith("+clip") for name in ("milan", "decoder"))
