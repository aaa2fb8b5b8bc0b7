"""The part of a network behind a layer: class scores of one image when the layer puts out something else.

The network runs once on the image. What its modules put out before the layer is kept, and given back in later passes
in place of running them, so that a pass computes only what comes after the layer: for as many versions of the layer's
output as a batch has rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.models.ablation import replaced
from milan_ray.models.hooks import call, find_places, first_tensor, hooked, mapped, tensors, unwrap
from milan_ray.models.inputs import computes_in, prepare, runs_alone
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelInput, ModelSpec

WHOLE_ROWS = 32
"""Rows of a pass of the whole network, whose first maps are large."""

Call = tuple[nn.Module, int]
"""A module, and which of its calls in a forward pass, counted from 1."""


class _NotReplayedError(Exception):
    """The network did something else than when it was recorded."""


@dataclass
class _Result:
    """What a call of a module put out.

    Attributes:
        output: A copy, of one image.
        within: How often each module was called inside this call.
        written_to: Whether something wrote into the output after the call.
    """

    output: object
    within: Counter[nn.Module]
    written_to: bool = True


@dataclass
class _Recording:
    """The forward pass of one image.

    Attributes:
        inputs: The network's input.
        results: What ended before the layer did, and is not inside of something that did.
        target: What the layer put out.
        logits: Class scores (1, classes).
    """

    inputs: ModelInput
    results: dict[Call, _Result] = field(default_factory=dict)
    target: _Result | None = None
    logits: torch.Tensor | None = None


class Tail:
    """A classifier behind one of its layers, for one image at a time.

    The layer's output is handled as values (C, …): its units first, then positions or tokens.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layer: Module path; of a module that runs several times the last call counts, or the n-th as ``path@n``.
        layout: How its output is read.

    Attributes:
        on_reached: Called in a pass when the layer is reached; None for nothing.
        replayed: Whether the last :meth:`logits` computed only what comes after the layer.

    Raises:
        MilanError: There is no such layer.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, layer: str, layout: Layout) -> None:
        self._spec, self._model, self._layer, self._layout = spec, unwrap(model), layer, layout
        self._place = find_places(model, [layer])[layer]
        self._axis = layout.units_axis + (layout.units_axis < layout.batch_axis)
        self._alone = runs_alone(model) or spec.max_batch == 1
        self._most = spec.batch(WHOLE_ROWS)
        self._axes: dict[Call, list[tuple[int, int]]] = {}  # of results: batch axis and rows per image
        self._copied: set[Call] = set()  # results that something writes into
        self._recording: _Recording | None = None
        self.on_reached: Callable[[], None] | None = None
        self.replayed = False
        self._target_call = self._place.call or 0
        parameter = next(iter(model.parameters()), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    @property
    def coarse(self) -> bool:
        """Whether the network computes in half precision."""
        return torch.finfo(computes_in(self._model)).bits < 32

    @property
    def base_logits(self) -> torch.Tensor:
        """Class scores of the recorded image, float32 (classes,)."""
        assert self._recording is not None and self._recording.logits is not None
        return self._recording.logits[0].float()

    @torch.no_grad()
    def record(self, view: torch.Tensor) -> torch.Tensor:
        """Runs the network on an image; later calls are about this image.

        Args:
            view: uint8 (H, W, bands), the model's view.

        Returns:
            The layer's values (C, …) for it.

        Raises:
            MilanError: The layer does not run or puts out no tensor, or the model does not put out class scores.
        """
        if not self._axes and not self._alone:
            self._find_axes(view)
        recording = self._recorded(view[None])
        assert recording.target is not None
        self._recording = recording
        own = first_tensor(recording.target.output)
        assert own is not None
        values: torch.Tensor = own.movedim(self._layout.batch_axis, 0)[0].movedim(self._axis - 1, 0)
        return values

    @torch.no_grad()
    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Class scores of the recorded image with other values in the layer.

        Args:
            rows: (R, C, …), versions of the layer's values.

        Returns:
            float32 (R, classes).

        Raises:
            MilanError: The model does not put out class scores.
        """
        self.replayed = True
        try:
            if self._alone or self._spec.max_batch is not None:
                return torch.cat([self._replay(part) for part in rows.split(1 if self._alone else self._most)])
            return self._replay(rows)
        except _NotReplayedError:
            self.replayed = False
            return self.whole_logits(rows)

    @torch.no_grad()
    def whole_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """As :meth:`logits`, by passes of the whole network in which only the layer's output is replaced."""
        parts = []
        for part in rows.split(1 if self._alone else self._most):
            calls, inputs = 0, self._repeated(len(part))

            def replace(module: nn.Module, args: object, output: object, part: torch.Tensor = part) -> object:
                nonlocal calls
                calls += 1
                own = first_tensor(output)
                if calls != self._target_call or own is None:
                    return output
                return replaced(output, own, self._as_output(part))

            with hooked([self._place.module.register_forward_hook(replace)]):
                parts.append(self._scores(call(self._model, inputs), len(part)))
        return torch.cat(parts)

    def _as_output(self, rows: torch.Tensor) -> torch.Tensor:
        """Values (R, C, …) in the axes of the layer's output: a copy, into which the network may write."""
        output = rows.movedim(1, self._axis).movedim(0, self._layout.batch_axis)
        return output.clone(memory_format=torch.contiguous_format)

    def _recorded(self, views: torch.Tensor) -> _Recording:
        """Runs the network on views (n, H, W, bands), and keeps what modules put out before the layer did."""
        self._target_call = self._place.call or self._count_calls(views)
        recording = _Recording(prepare(self._spec, self._model, to_device(views, self._device)))
        calls: Counter[nn.Module] = Counter()
        started: list[nn.Module] = []
        open_calls: list[tuple[nn.Module, int, int]] = []
        versions: list[tuple[_Result, list[tuple[torch.Tensor, int | None]]]] = []

        def begin(module: nn.Module, args: object) -> None:
            calls[module] += 1
            started.append(module)
            open_calls.append((module, calls[module], len(started)))

        def end(module: nn.Module, args: object, output: object) -> None:
            found, number, first = open_calls.pop()
            if found is not module or recording.target is not None:
                return
            within = Counter(started[first:])
            result = _Result(mapped(output, torch.clone), within)
            versions.append((result, [(t, None if t.is_inference() else t._version) for t in tensors(output)]))
            for inner in within:  # a call that is given back as a whole runs nothing inside
                for n in range(calls[inner] - within[inner] + 1, calls[inner] + 1):
                    recording.results.pop((inner, n), None)
            if module is self._place.module and number == self._target_call:
                recording.target = result
            else:
                recording.results[module, number] = result

        able = [module for module in self._model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        handles = (
            handle
            for module in able
            for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end))
        )
        with hooked(handles):
            output = call(self._model, recording.inputs)
        if recording.target is None or first_tensor(recording.target.output) is None:
            raise MilanError(f"layer {self._layer!r} puts out no tensor in the forward pass: choose another layer.")
        if self._place.call is None and calls[self._place.module] != self._target_call:
            raise MilanError(
                f"layer {self._layer!r} runs {calls[self._place.module]} times for one image and {self._target_call} "
                f"times for another: choose one of its calls, as {self._layer + '@1'!r}."
            )
        for result, before in versions:
            result.written_to = any(version is None or tensor._version != version for tensor, version in before)
        recording.logits = self._scores(output, len(views))
        return recording

    def _count_calls(self, views: torch.Tensor) -> int:
        """How often the layer's module runs; the last time counts."""
        if self._target_call:
            return self._target_call
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1

        with hooked([self._place.module.register_forward_hook(count)]):
            call(self._model, prepare(self._spec, self._model, to_device(views, self._device)))
        if not seen:
            raise MilanError(f"layer {self._layer!r} does not run in the model's forward pass: choose another layer.")
        return seen

    def _find_axes(self, view: torch.Tensor) -> None:
        """Finds the batch axis of every result: the one that is twice as long for two images."""
        one, two = self._recorded(view[None]), self._recorded(view[None].repeat(2, 1, 1, 1))
        assert one.target is not None and two.target is not None
        target = self._place.module, self._target_call
        others = {**two.results, target: two.target}
        for key, result in {**one.results, target: one.target}.items():
            if key in others:
                pairs = zip(tensors(result.output), tensors(others[key].output), strict=False)
                self._axes[key] = [_batch_axis(tuple(a.shape), tuple(b.shape)) for a, b in pairs]

    def _replay(self, rows: torch.Tensor) -> torch.Tensor:
        """One pass that computes only what comes after the layer.

        Results are given back as views that repeat one image. Where the network writes into such a result, which torch
        refuses, it gets a copy from then on.
        """
        recording = self._recording
        assert recording is not None
        while True:
            given: list[Call] = []
            try:
                with self._given_back(recording, rows, given):
                    return self._scores(call(self._model, self._repeated(len(rows), copy=False)), len(rows))
            except RuntimeError as error:
                fresh = (key for key in reversed(given) if key not in self._copied)
                written = next((key for key in fresh if recording.results[key].written_to), None)
                if written is None:
                    raise _NotReplayedError from error
                self._copied.add(written)
            except (ValueError, IndexError, KeyError) as error:
                raise _NotReplayedError from error

    @contextmanager
    def _given_back(self, recording: _Recording, rows: torch.Tensor, given: list[Call]) -> Iterator[None]:
        """Makes modules give back what they put out before, and the layer the rows, as long as the context lasts."""
        assert recording.target is not None
        calls: Counter[nn.Module] = Counter()
        modules = dict.fromkeys([module for module, _ in recording.results] + [self._place.module])
        before = {module: module.__dict__.get("forward") for module in modules}
        reached = False

        def giving_back(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def give(*args: object, **arguments: object) -> object:
                nonlocal reached
                calls[module] += 1
                key = module, calls[module]
                if module is self._place.module and calls[module] == self._target_call:
                    reached = True
                    assert recording.target is not None
                    calls.update(recording.target.within)
                    if self.on_reached is not None:
                        self.on_reached()
                    return self._expanded(key, recording.target, len(rows), self._as_output(rows))
                if key not in recording.results:
                    return forward(*args, **arguments)
                given.append(key)
                calls.update(recording.results[key].within)
                return self._expanded(key, recording.results[key], len(rows))

            return give

        try:
            for module in modules:
                module.__dict__["forward"] = giving_back(module, module.forward)
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward
        if not reached:
            raise _NotReplayedError

    def _expanded(self, key: Call, result: _Result, rows: int, first: torch.Tensor | None = None) -> object:
        """A result of one image, for so many rows; with other values for its first tensor, where there are some."""
        axes = iter(self._axes.get(key, []))
        own = None if first is None else first_tensor(result.output)

        def expand(tensor: torch.Tensor) -> torch.Tensor:
            where, size = next(axes, _UNKNOWN)
            if first is not None and tensor is own:
                return first
            if rows == 1 or size == 0:
                return tensor.clone() if result.written_to else tensor
            if size < 0:
                raise _NotReplayedError
            if size > 1:
                return tensor.repeat([rows if n == where else 1 for n in range(tensor.ndim)])
            wide = tensor.expand([rows if n == where else -1 for n in range(tensor.ndim)])
            return wide.contiguous() if key in self._copied else wide

        return mapped(result.output, expand)

    def _repeated(self, rows: int, copy: bool = True) -> ModelInput:
        """The image's input, for so many rows."""
        assert self._recording is not None

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 0 or len(tensor) != 1 or rows == 1:
                return tensor
            wide = tensor.expand(rows, *tensor.shape[1:])
            return wide.contiguous() if copy else wide

        inputs: ModelInput = mapped(self._recording.inputs, repeat)  # type: ignore[assignment]
        return inputs

    def _scores(self, output: object, rows: int) -> torch.Tensor:
        scores = first_tensor(output)
        if scores is None or scores.ndim != 2 or len(scores) != rows or scores.shape[1] < 2:
            raise MilanError(
                f"{self._spec.name} does not put out one row of class scores per image; effects on classes are of "
                "classifiers."
            )
        return scores.float()


_CONSTANT, _UNKNOWN = (0, 0), (0, -1)


def _batch_axis(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, int]:
    """The axis that is twice as long for two images, and its length for one.

    Returns:
        :data:`_CONSTANT` where the number of images changes nothing, :data:`_UNKNOWN` where it changes something else.
    """
    if one == two:
        return _CONSTANT
    differing = [axis for axis, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) != len(two) or len(differing) != 1 or two[differing[0]] != 2 * one[differing[0]]:
        return _UNKNOWN
    return differing[0], one[differing[0]]
