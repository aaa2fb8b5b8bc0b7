"""Ground truth for conformance: the maps of layers according to the network's own library.

Libraries list maps of some modules, with or without their paths. The layout of an unlisted module is inferred from a
listed one where possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from milan_ray.models.hooks import call
from milan_ray.models.registry import OUTPUTS, ModelSpec

IMAGES = 3
"""Images per network: enough to test a permutation, few enough to be fast."""


@dataclass
class Subject:
    """A network of a family, ready to be compared.

    Attributes:
        spec: This project's specification of the network.
        network: The network, in eval mode.
        truths: Maps views uint8 (n, H, W, 3) to the library's maps of layers, each (n, U, h, w); by path if the library
            names the module, otherwise in any order.
    """

    spec: ModelSpec
    network: nn.Module
    truths: Callable[[torch.Tensor], dict[str, torch.Tensor] | list[torch.Tensor]]


@torch.inference_mode()
def truths_of(subject: Subject, views: np.ndarray) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns every module's output tensors, and the library's maps of the modules that it lists, by path.

    Maps without a module name are matched to the module whose output holds the same values, in any order. A module's
    output tensors after the first are named ``path#1``, ``path#2``, ….
    """
    inputs = torch.from_numpy(views)
    truths = subject.truths(inputs)
    raw: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in subject.network.named_modules():

        def note(module: nn.Module, args: object, output: object, path: str = path or OUTPUTS) -> None:
            for number, tensor in enumerate(_tensors(output)):
                raw[f"{path}#{number}" if number else path] = tensor

        handles.append(module.register_forward_hook(note))
    try:
        call(subject.network, subject.spec.prepare(inputs))
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(truths, dict):
        return raw, truths
    matched: dict[str, torch.Tensor] = {}
    sums = {path: _sums(tensor) for path, tensor in raw.items() if tensor.is_floating_point() and tensor.numel()}
    for maps in truths:
        wanted = _sums(maps)
        same = [path for path in sums if path != OUTPUTS and _holds(raw[path], sums[path], maps, wanted)]
        if same:
            matched[min(same, key=lambda path: ("#" in path, path.count("."), len(path)))] = maps
    return raw, matched


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    members = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for member in members for tensor in _tensors(member)]


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    exact = tensor.double()
    return exact.sum().item(), exact.square().sum().item()


def _close(own: tuple[float, float], other: tuple[float, float]) -> bool:
    size = max(own[1], other[1], 1e-300)
    return abs(own[1] - other[1]) <= 1e-7 * size and abs(own[0] - other[0]) <= 1e-5 * max(size**0.5, abs(own[0]))


def _holds(tensor: torch.Tensor, sums: tuple[float, float], maps: torch.Tensor, wanted: tuple[float, float]) -> bool:
    """Whether a module's output holds the values of maps (n, U, h, w), possibly among other tokens."""
    if tensor.numel() == maps.numel():
        return _close(sums, wanted)
    if tensor.ndim != 3 or tensor.shape[2] != maps.shape[1] or len(tensor) != len(maps):
        return False
    positions = maps.shape[2] * maps.shape[3]
    more = tensor.shape[1] - positions
    if not 0 < more <= 300:
        return False
    starts = range(more + 1) if more <= 20 else (0, more)
    return any(_close(_sums(tensor[:, start : start + positions]), wanted) for start in starts)


def arranged(
    network: nn.Module, layer: str, raw: dict[str, torch.Tensor], truths: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Returns the maps (n, U, h, w) of a module that the library does not list; None if its layout is ambiguous.

    The order of tokens is that of a listed layer with as many tokens. The units axis of maps follows from torch's
    definition of the module, or from the position of a listed layer's grid in the shape.
    """
    output = raw[layer]
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim == 3 and len(output) == IMAGES:
        nearest = sorted(truths, key=lambda path: -_common(path, layer))
        for path in nearest:
            maps = truths[path]
            tokens = raw.get(path)
            if tokens is not None and tokens.ndim == 3 and tokens.shape[:2] == output.shape[:2]:
                order = _token_order(tokens[0], maps[0])
                if order is not None:
                    return output[:, order].transpose(1, 2).unflatten(2, maps.shape[2:])
    if output.ndim == 4 and len(output) == IMAGES:
        axis = _units_axis(network.get_submodule(layer) if layer != OUTPUTS else network)
        if axis is None:
            grids = {tuple(maps.shape[2:]) for maps in truths.values()}
            first, last = tuple(output.shape[2:]) in grids, tuple(output.shape[1:3]) in grids
            axis = 1 if first and not last else 3 if last and not first else None
        if axis is not None:
            return output.movedim(axis, 1)
    return None


def _common(path: str, other: str) -> int:
    """Returns the length of the common prefix of two module paths, in parts."""
    parts = list(zip(path.split("."), other.split("."), strict=False))
    return next((number for number, (own, its) in enumerate(parts) if own != its), len(parts))


def _units_axis(module: nn.Module) -> int | None:
    """Returns the units axis of a module's 4-d output by torch's definition; None if torch does not define it."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return 1
    return 3 if type(module) in (nn.Linear, nn.LayerNorm) else None


def _token_order(tokens: torch.Tensor, maps: torch.Tensor) -> torch.Tensor | None:
    """Finds the token (of (T, U)) with the values of each position of maps (U, h, w), row by row; None if unclear."""
    wanted = maps.flatten(1).T.double()
    distances = torch.cdist(wanted, tokens.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    if nearest.values.amax() > 1e-3 * wanted.norm(dim=1).amax() or len(nearest.indices.unique()) < len(wanted):
        return None
    return nearest.indices
