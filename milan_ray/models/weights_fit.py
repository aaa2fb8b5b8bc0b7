"""Finds the part of a weights file that fits a network, by names and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.checkpoints import StateDict

_PREFIX = 8  # dots in a prefix at most


class UnfitWeights(MilanError):
    """Nothing in a file of weights fits the network."""


@dataclass(frozen=True)
class Fit:
    """The tensors of a state dict under one prefix.

    Attributes:
        state: The state dict.
        prefix: The prefix, empty or ending with a dot.
        names: The network's names → the file's.
        left: The file's names of tensors outside the prefix.
        twins: Pairs of the file's names that mean the same tensor of the network.
    """

    state: StateDict
    prefix: str
    names: dict[str, str]
    left: tuple[str, ...]
    twins: tuple[tuple[str, str], ...] = ()

    @property
    def path(self) -> str:
        """The part that selects it in ``FILE#PART``."""
        return ".".join(filter(None, (self.state.address, self.prefix.rstrip("."))))

    @property
    def sources(self) -> tuple[str, dict[str, str]]:
        """Where each tensor comes from: the state dict's address, and the network's names → the file's."""
        return self.state.address, self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by the network's name."""
        return self.state.shapes[self.names[name]]

    def matching(self, own: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """How well it fits: the number of names with equal shapes, then the number of equal names."""
        common = [name for name in self.names if name in own]
        return sum(self.shape(name) == own[name] for name in common), len(common)

    def problems(self, own: Mapping[str, tuple[int, ...]], needed: set[str], sizes: bool) -> list[str]:
        """Why it does not fit: missing names, unexpected names and, if ``sizes`` is true, different shapes."""
        missing = [name for name in own if name in needed and name not in self.names]
        unexpected = [name for name in self.names if name not in own]
        different = [
            f"{name} {self.shape(name)} for {own[name]}"
            for name in own
            if sizes and name in self.names and self.shape(name) != own[name]
        ]
        return describe_problems(missing, unexpected, different)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The network's names → tensors."""
        tensors = self.state.tensors()
        return {name: tensors[of] for name, of in self.names.items()}

    def check_twins(self, path: str) -> None:
        """Checks that names of the same tensor hold the same numbers."""
        tensors = self.state.tensors() if self.twins else {}
        for one, other in self.twins:
            if not same_tensors({"": tensors[one]}, {"": tensors[other]}):
                raise MilanError(
                    f"weights file {path} holds {one!r} and {other!r}, which are the same weights of the network, with "
                    "different numbers: save the state_dict() again without those that are not meant."
                )


def find_fits(
    state: StateDict,
    own: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, Sequence[str]],
    rename: Callable[[str], str],
    needless: Callable[[str], bool],
) -> Iterator[Fit]:
    """Yields the tensors of a state dict without a prefix, and under each prefix with enough of them."""
    below = Counter(prefix for name in state.shapes for prefix in _prefixes(name))
    prefixes = [prefix for prefix, count in below.items() if 2 * count >= len(own) or count == len(state.shapes)]
    for prefix in ("", *prefixes):
        names: dict[str, str] = {}
        twins: list[tuple[str, str]] = []
        for name in state.shapes:
            if name.startswith(prefix):
                renamed = _parametrized(rename(_plain(name[len(prefix) :], own)), own)
                if renamed in names:
                    twins.append((names[renamed], name))
                elif renamed in own or not needless(renamed):
                    names[renamed] = name
        for name in own:  # files of tied weights may hold them once
            same = next((other for other in tied.get(name, ()) if other in names), None)
            if name not in names and same is not None:
                names[name] = names[same]
        left = tuple(name for name in state.shapes if not name.startswith(prefix))
        yield Fit(state, prefix, names, left, tuple(twins))


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of tied parameters: each name → the other names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


_PARAMETRIZED = {"g": ("original0",), "v": ("original1", "0._v"), "orig": ("original",), "u": ("0._u",)}
"""Name endings of older weight and spectral norms → the endings since these norms are parametrizations."""


def _parametrized(name: str, own: Mapping[str, object]) -> str:
    """Converts the name of an older weight or spectral norm to its parametrization's, where the network has that."""
    path, dot, leaf = name.rpartition(".")
    tensor, _, ending = leaf.rpartition("_")
    now = (f"{path}{dot}parametrizations.{tensor}.{rest}" for rest in _PARAMETRIZED.get(ending, ()))
    return name if name in own else next((one for one in now if one in own), name)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, min(len(parts), _PREFIX))]


def _plain(name: str, own: Mapping[str, object]) -> str:
    """A name without ``_orig_mod.``, which compilation adds, unless the network itself has the name."""
    return name if name in own else name.replace("_orig_mod.", "")


def same_tensors(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether both have the same names, types and numbers."""
    return some.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in some.items()
    )


def describe_problems(missing: list[str], unexpected: list[str], different: list[str]) -> list[str]:
    """How many names are missing, unexpected or of another shape, and the first of each."""
    return [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", different))
        if names
    ]


def misfit(
    path: str, model: str, problems: list[str], nearest: Fit, own: Mapping[str, tuple[int, ...]]
) -> UnfitWeights:
    """The error for a file in which nothing fits; its message names the nearest part and what to do."""
    where = f", below {nearest.path!r}" if nearest.path else ""
    exact, common = nearest.matching(own)
    register = "register the network that it is of in a plug-in"
    if not common:
        names = list(nearest.names.values())
        shared = [prefix for prefix in _prefixes(names[0]) if all(name.startswith(prefix) for name in names)]
        begin = f"all its names begin with {shared[-1]!r}" if shared else f"its names are others ({names[0]})"
        remedy = (
            f"{begin}: save the state_dict() again with the names of this one ({next(iter(own), '')}), or {register}"
        )
    elif exact == common:
        remedy = f"it has other parts: save the state_dict() of this network, or {register}"
    else:
        remedy = f"it is of another size or has another head: {register}"
    return UnfitWeights(f"weights file {path} does not fit {model}: weights {', '.join(problems)}{where}; {remedy}.")
