"""Records the calls, output shapes and features of a network's modules in two passes of different batch sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from milan_ray.models.hooks import Place, hooked

Key = tuple[nn.Module, int]
"""A module and which of its calls in a forward pass, counted from 1."""

_OF_MAPS = ("conv2d", "convtranspose2d", "batchnorm2d", "instancenorm2d", "layernorm2d")
"""Endings of the lower-case class names of modules that work on maps (B, U, H, W)."""

_WIDTHS = (
    ("out_features", -1),
    ("out_channels", 1),
    ("num_features", 1),
    ("num_channels", 1),
    ("embed_dim", -1),
    ("embedding_dim", -1),
    ("hidden_size", -1),
    ("nf", -1),
)
"""Attributes that hold a module's number of features, and the output axis that usually holds these features."""


def features(module: nn.Module, shape: torch.Size) -> tuple[int, int | None] | None:
    """Number and output axis of the features of a module without children.

    Args:
        module: A linear map, convolution, norm or the like.
        shape: Shape of its output, images first.

    Returns:
        The number and the axis (None where it is uncertain); None where the module declares no features.
    """
    rank = len(shape)
    for name, usual in _WIDTHS:
        count: object = getattr(module, name, None)
        axis = usual % rank if rank else 0
        if isinstance(count, int) and count in shape:
            return count, axis if usual < rank and shape[axis] == count else None
    normalized = getattr(module, "normalized_shape", None)
    if normalized is not None and len(normalized) == 1:
        width = int(normalized[0])
        axis = 1 if type(module).__name__.lower().endswith("2d") else rank - 1  # LayerNorm2d of timm and torchvision
        return (width, axis) if shape[axis] == width else None
    widths = {p.numel() for p in module.parameters(recurse=False) if p.numel() == max(p.shape, default=0)}
    if len(widths) == 1 and (width := widths.pop()) > 1 and width in shape[1:]:
        axes = [axis for axis in range(1, rank) if shape[axis] == width]
        return width, axes[0] if len(axes) == 1 else None
    return None


@dataclass
class Call:
    """One call of a module.

    Attributes:
        started: Position of its start in the order of all events.
        ended: Position of its return in the same order.
        shape: Shape of its output tensor.
        features: Number and axis of the module's features, as returned by :func:`features`.
        of_maps: Whether the module's type works on maps (B, U, H, W).
        bare: Whether the output is the tensor itself, not a container around it.
    """

    started: int
    ended: int = 0
    shape: torch.Size = field(default_factory=torch.Size)
    features: tuple[int, int | None] | None = None
    of_maps: bool = False
    bare: bool = True


@dataclass(frozen=True)
class Units:
    """Which axis of a layer's output counts its units.

    Attributes:
        axis: The axis, images first; None where it is unknown.
        certain: Whether no other axis is possible.
        of_maps: Whether the module that determines the axis works on maps (B, U, H, W).
    """

    axis: int | None = None
    certain: bool = False
    of_maps: bool = False


class Structure:
    """Records a network's passes.

    Args:
        model: The network.
        tensor: Extracts the tensor from a module's output.
    """

    def __init__(self, model: nn.Module, tensor: Callable[[object], torch.Tensor | None]) -> None:
        self._model, self.tensor = model, tensor
        self.alone = False  # images are shown one at a time, so that no axis follows their number
        self.calls: dict[Key, Call] = {}
        self._smaller: dict[Key, torch.Size] = {}

    @contextmanager
    def recording(self, smaller: bool = False) -> Iterator[None]:
        """Records the calls of every module in a pass; in the second pass, with fewer images, only the shapes."""
        events = itertools.count()
        numbers: dict[nn.Module, int] = {}
        running: dict[nn.Module, list[tuple[int, int]]] = {}

        def before(module: nn.Module, args: object) -> None:
            numbers[module] = numbers.get(module, 0) + 1
            running.setdefault(module, []).append((numbers[module], next(events)))

        def after(module: nn.Module, args: object, output: object) -> None:
            number, started = running[module].pop()
            tensor = self.tensor(output)
            if tensor is None:
                return
            if smaller:
                self._smaller[module, number] = tensor.shape
                return
            leaf = next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention)
            self.calls[module, number] = Call(
                started,
                next(events),
                tensor.shape,
                features(module, tensor.shape) if leaf else None,
                type(module).__name__.lower().endswith(_OF_MAPS),
                tensor is output,
            )

        modules = [module for module in self._model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        starts = [module.register_forward_pre_hook(before) for module in modules]
        with hooked([*starts, *(module.register_forward_hook(after) for module in modules)]):
            yield

    def key(self, place: Place) -> Key | None:
        """The call that a layer's values come from; None where it was not recorded."""
        numbers = [number for module, number in self.calls if module is place.module]
        number = place.call or max(numbers, default=0)
        return (place.module, number) if number in numbers else None

    def image_axis(self, key: Key) -> int | None:
        """The axis of a call's output that follows the number of images; None where there is no such axis."""
        first, second = self.calls[key].shape, self._smaller.get(key, torch.Size())
        if self.alone:
            return 0 if first[:1] == second[:1] == (1,) else None
        if len(first) != len(second):
            return None
        changed = [axis for axis in range(len(first)) if first[axis] != second[axis]]
        return changed[0] if len(changed) == 1 and first[changed[0]] - second[changed[0]] == 1 else None

    def map_sizes(self, key: Key | None) -> list[tuple[int, int]]:
        """(height, width) of the maps that convolutions and their norms computed until a call ended, latest first."""
        end = float("inf") if key is None else self.calls[key].ended
        maps = [call for call in self.calls.values() if call.of_maps and len(call.shape) == 4 and call.ended <= end]
        sizes = [(call.shape[2], call.shape[3]) for call in sorted(maps, key=lambda call: -call.ended)]
        return list(dict.fromkeys(sizes))

    def units(self, key: Key | None, batch: int, per_image: tuple[int, ...]) -> Units:
        """Determines the axis of a call's output that counts units, from the last module with features.

        This module is the last linear map, convolution or norm inside the call; without one, the last before it.

        Args:
            key: The call.
            batch: The axis of its output that counts images.
            per_image: Its other axes.
        """
        if key is None:
            return Units()
        own = self.calls[key]
        spoke = [call for call in self.calls.values() if call.features]
        inside = [call for call in spoke if own.started <= call.started and call.ended <= own.ended]
        leaf = max(inside or [c for c in spoke if c.ended < own.started], key=lambda call: call.ended, default=None)
        if leaf is None or leaf.features is None:
            return Units()
        count, axis = leaf.features
        if axis is not None and axis != batch and leaf.shape == own.shape:
            # Of several axes with this size, another one may count the units by now, unless the layer itself declares
            # the axis or the module works on maps: blocks of convolutions put out maps.
            certain = leaf is own or per_image.count(count) == 1 or (leaf in inside and leaf.of_maps)
            return Units(axis + (axis < batch), certain, leaf.of_maps)
        axes = [number + 1 for number, size in enumerate(per_image) if size == count]
        if len(axes) == 1:
            # The width of an earlier layer is weak evidence where this layer may have a single unit.
            return Units(axes[0], bool(inside) or 1 not in per_image, leaf.of_maps and axes[0] == 1)
        if axis is not None and batch == 0 and len(leaf.shape) == len(own.shape):
            others = [number for number in range(1, len(own.shape)) if leaf.shape[number] != own.shape[number]]
            return Units(axis, others == [axis], leaf.of_maps)  # certain: parts concatenated along the units
        return Units(axes[0] if axes else None)
