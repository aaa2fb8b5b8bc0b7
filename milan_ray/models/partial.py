"""Weights of a part of a network: what its file lacks, and which layers do not need that.

Missing weights become NaN, so that whatever depends on them is NaN, too, and nobody can take it for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

_ACCEPTED: ContextVar[dict[str, list[str]] | None] = ContextVar("accepted", default=None)


@contextmanager
def accepting_parts(accept: bool = True) -> Iterator[dict[str, list[str]]]:
    """Lets files of weights lack some inside the context, where the reader of the file supports it.

    Args:
        accept: Whether to; otherwise the context changes nothing.

    Yields:
        File → names of the weights that it lacks; filled by :func:`fill`.
    """
    lacking: dict[str, list[str]] = {}
    token = _ACCEPTED.set(lacking if accept else None)
    try:
        yield lacking
    finally:
        _ACCEPTED.reset(token)


def accepts_parts() -> bool:
    """Whether files of weights may lack some here."""
    return _ACCEPTED.get() is not None


def fill(model: nn.Module, missing: Iterable[str], path: str) -> bool:
    """Sets weights that a file lacks to NaN.

    Args:
        model: The network.
        missing: Their names.
        path: The file.

    Returns:
        Whether that was possible: weights may be missing here, and all of these are floating-point numbers.
    """
    lacking, state, names = _ACCEPTED.get(), model.state_dict(), list(missing)
    if lacking is None or not all(state[name].is_floating_point() for name in names):
        return False
    with torch.no_grad():
        for name in names:
            state[name].fill_(torch.nan)
    lacking[path] = names
    return True


def modules_in_need(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """The modules whose output holds NaN, in the order of the network; last the network itself as ``""``.

    Args:
        model: The network.
        run: Runs it.
    """
    found: set[str] = set()

    def look(path: str, module: nn.Module, args: object, output: object) -> None:
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in _tensors(output)):
            found.add(path)

    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(partial(look, path)))
        run()
    return [path for path in (*paths[1:], "") if path in found]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for member in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(member)
