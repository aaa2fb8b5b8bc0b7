"""Ablation: a network's outputs when some units of its layers are set to zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.establish import established
from milan_ray.models.hooks import call, find_places, first_tensor, hooked, mapped
from milan_ray.models.inputs import prepare
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec

UnitSet = Mapping[str, Sequence[int]]
"""Layer → its units that are switched off."""

ROWS = 512
"""Largest number of rows (sets × images) of a pass after the first changed layer."""


class Ablation:
    """A classifier with each of several sets of units switched off.

    A unit is switched off by setting it to zero in its layer's output, at all positions or in all tokens. Features are
    switched off by projecting their directions out of it, so that nothing of the span of the directions is left: units
    are the features whose directions are the axes. The part of
    the network before the first changed layer gives the same values for all sets that share this layer, so it runs
    once. The layer's output is then repeated once per set, and the rest of the network processes a longer batch. A
    network with a shortcut around the layer does not allow this: a trial on the first images detects that, and each
    set then gets a full pass of its own.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        sets: Sets of units; an empty set leaves the model unchanged.
        rows: Largest number of rows of a pass; limits memory use.

    Raises:
        MilanError: A layer or unit does not exist, or the directions of features are unknown.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, sets: Sequence[UnitSet], rows: int = ROWS) -> None:
        self._spec, self._model, self._rows = spec, model, rows
        self._sets = [{layer: sorted(set(units)) for layer, units in set_.items() if len(units)} for set_ in sets]
        layers = list(dict.fromkeys(layer for units in self._sets for layer in units))
        self._places = find_places(model, dict.fromkeys(map(spec.base, layers)))
        self._directions = {layer: directions(spec, layer) for layer in layers if layer in spec.features}
        self._layouts: dict[str, Layout] = {}
        self._last: Counter[str] = Counter()  # layer → which call of its module counts
        self._groups: dict[str | None, list[int]] | None = None  # first changed layer → indices of its sets
        self._shared: dict[str | None, bool] = {None: True}  # first layer → whether the pass before it can be shared

    @torch.inference_mode()
    def logits(self, views: torch.Tensor) -> torch.Tensor:
        """The model's outputs with each set switched off.

        Args:
            views: uint8 (n, H, W, 3), the model's views.

        Returns:
            float32 (sets, n, classes), on the CPU.

        Raises:
            MilanError: A set names a unit that its layer does not have, a layer puts out no tensor, or the model does
                not put out one row of logits per image.
        """
        if self._groups is None:
            self._groups = self._grouped(views[:1])
        outputs: list[torch.Tensor | None] = [None] * len(self._sets)
        some = max(1, self._rows // len(views))
        for first, group in self._groups.items():
            for start in range(0, len(group), some):
                numbers = group[start : start + some]
                for number, output in zip(numbers, self._run(views, first, numbers), strict=True):
                    outputs[number] = output
        return torch.stack([output for output in outputs if output is not None])

    def correct(self, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Counts the images of each class that are classified correctly under each set.

        Args:
            views: uint8 (n, H, W, 3).
            labels: int64 (n,), class indices.

        Returns:
            int64 (sets, classes).

        Raises:
            MilanError: As for :meth:`logits`, or a label exceeds the model's number of classes.
        """
        logits = self.logits(views)
        if len(labels) and int(labels.max()) >= logits.shape[-1]:
            raise MilanError(
                f"{self._spec.name} tells {logits.shape[-1]} classes, and the images have at least "
                f"{int(labels.max()) + 1}: give images of the model's classes."
            )
        right = logits.argmax(-1) == labels
        counts = torch.zeros(len(self._sets), logits.shape[-1], dtype=torch.int64)
        return counts.index_add_(1, labels, right.long())

    def _grouped(self, views: torch.Tensor) -> dict[str | None, list[int]]:
        """Groups the sets, by their indices, by the changed layer that runs first."""
        self._layouts = established(self._spec, self._model, list(self._places), positions=False)
        order: list[str] = []
        handles = (
            place.module.register_forward_hook(lambda *_, layer=layer: order.append(layer))
            for layer, place in self._places.items()
        )
        with hooked(handles):
            call(self._model, prepare(self._spec, self._model, self._on_device(views)))
        self._last = Counter({layer: place.call or order.count(layer) for layer, place in self._places.items()})
        if absent := [layer for layer in self._places if layer not in order]:
            raise MilanError(f"layer {absent[0]!r} does not run in the model's forward pass: choose another layer.")
        groups: dict[str | None, list[int]] = {}
        for number, units in enumerate(self._sets):
            groups.setdefault(min(map(self._spec.base, units), key=order.index, default=None), []).append(number)
        return groups

    def _run(self, views: torch.Tensor, first: str | None, numbers: Sequence[int]) -> torch.Tensor:
        """Logits (sets, n, classes) of sets with the same first changed layer."""
        sets = [self._sets[number] for number in numbers]
        if first is None:
            return self._pass(views, sets[:1], first=None).expand(len(sets), -1, -1)
        if first not in self._shared and len(views) > 1 and len(sets) > 1:
            self._shared[first] = self._can_share(views[:2], sets[:2], first)
        if self._shared.get(first, False):
            return self._pass(views, sets, first)
        return torch.cat([self._pass(views, [one], first=None) for one in sets])

    def _can_share(self, views: torch.Tensor, sets: Sequence[UnitSet], first: str) -> bool:
        """Whether a shared pass gives the same logits as separate passes."""
        try:
            together = self._pass(views, sets, first)
        except (RuntimeError, ValueError, IndexError):  # torch's errors where batches of different lengths meet
            return False
        apart = torch.cat([self._pass(views, [one], first=None) for one in sets])
        return together.shape == apart.shape and torch.allclose(together, apart, rtol=1e-3, atol=1e-4)

    def _pass(self, views: torch.Tensor, sets: Sequence[UnitSet], first: str | None) -> torch.Tensor:
        """Runs one forward pass; without a ``first`` layer at which to repeat the batch, ``sets`` holds one set.

        Returns:
            (sets, n, classes), on the CPU.
        """
        handles = (
            self._places[layer].module.register_forward_hook(self._switch(layer, sets, len(views), first))
            for layer in dict.fromkeys(self._spec.base(layer) for units in sets for layer in units)
        )
        with hooked(handles):
            output = first_tensor(call(self._model, prepare(self._spec, self._model, self._on_device(views))))
        if output is None or output.ndim != 2 or len(output) != len(sets) * len(views):
            raise MilanError(
                f"{self._spec.name} does not put out one row of logits per image; units are ablated in classifiers."
            )
        return output.float().cpu().view(len(sets), len(views), -1)

    def _switch(self, layer: str, sets: Sequence[UnitSet], images: int, first: str | None) -> Any:
        """A forward hook that sets units of a layer's output to zero, for each set in its own rows."""
        layout, calls = self._layouts[layer], 0

        def hook(module: nn.Module, args: object, output: object) -> object:
            nonlocal calls
            calls += 1
            if calls != self._last[layer]:
                return output
            own = first_tensor(output)
            if own is None:
                raise MilanError(f"layer {layer!r} puts out no tensor, so that its units cannot be switched off.")
            tensor = own.movedim(layout.batch_axis, 0)
            axis = layout.units_axis + (layout.units_axis < layout.batch_axis)
            times = len(sets) if first is not None and len(tensor) == images else 1
            # Always a copy, because the layer's output may be used elsewhere too.
            changed = tensor.repeat(times, *[1] * (tensor.ndim - 1))
            rows = changed.unflatten(0, (len(sets), len(changed) // len(sets))).movedim(axis + 1, 2)
            for number, one in enumerate(sets):
                units, basis = one.get(layer, []), self._basis(layer, one, layout.width)
                if basis is None:
                    rows[number, :, units] = 0
                else:
                    outputs, basis = rows[number].movedim(1, -1), basis.to(rows)
                    rows[number] = (outputs - outputs @ basis @ basis.T).movedim(-1, 1)
            return replaced(output, own, changed.movedim(0, layout.batch_axis))

        return hook

    def _basis(self, base: str, one: UnitSet, width: int) -> torch.Tensor | None:
        """An orthonormal basis (C, r) of what a set switches off in a layer; None where that is units alone."""
        vectors = []
        for layer, numbers in one.items():
            if self._spec.base(layer) != base:
                continue
            count = len(self._directions[layer]) if layer in self._directions else width
            if not 0 <= numbers[0] <= numbers[-1] < count:
                raise MilanError(f"layer {layer!r} has {count} units, so none of number {numbers[-1]}.")
            if layer in self._directions:
                vectors.append(self._directions[layer][list(numbers)])
        if not vectors:
            return None
        return spanned(torch.cat([torch.eye(width)[list(one.get(base, []))], *vectors]))

    def _on_device(self, views: torch.Tensor) -> torch.Tensor:
        parameter = next(iter(self._model.parameters()), None)
        return views if parameter is None else views.to(parameter.device)


def directions(spec: ModelSpec, layer: str) -> torch.Tensor:
    """What each feature of a feature set adds to its layer's output, float32 (F, C).

    Raises:
        MilanError: The set does not say.
    """
    features = spec.features[layer]
    if features.directions is None:
        raise MilanError(
            f"features {features.name!r} of {spec.name} have no directions, so that they cannot be switched off: "
            "register them with directions=, what each adds to the layer's output."
        )
    return features.directions()


def spanned(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (C, r) of the span of vectors (n, C)."""
    _, sizes, basis = torch.linalg.svd(vectors, full_matrices=False)
    kept: torch.Tensor = basis[sizes > sizes.max() * 1e-6 * max(vectors.shape)]
    return kept.T


def replaced(output: object, old: torch.Tensor, new: torch.Tensor) -> object:
    """A module's output with one tensor in it replaced by another."""
    return mapped(output, lambda tensor: new if tensor is old else tensor)
