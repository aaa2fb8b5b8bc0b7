"""Determines how a model's layers are read, by a few small forward passes, before their values are used.

1. Three pictures, then two of them in another order, twice: the axis that follows the number of images is the batch,
   and an image's values must not depend on the other images. This detects windows stacked on the batch axis, batch
   statistics, random masking and active dropout.
2. The features of the layer's last linear map, convolution or norm give the axis of the units.
3. Grey pictures with one lit patch each: a layer responds at the patch. This confirms the positions, or finds their
   order (:mod:`milan_ray.models.positions`).
4. A picture that is lit everywhere, and one for each margin: margins on which nothing depends were cut off, and tokens
   that respond to no picture are not positions (:mod:`milan_ray.models.unseen`).

This takes twenty pictures in all, counting plain grey ones. Layers whose tokens come in an unknown order take up to
thirty more. Layers that respond too faintly take up to 49 more with patches lit in other layers, and 21 with patches
lit in their own maps.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.batch_mates import about, agree, dimmed, exactly
from milan_ray.models.hooks import (
    OWN_OUTPUT,
    LayerTap,
    call,
    find_places,
    first_tensor,
    named_layers,
    no_activations,
    unwrap,
)
from milan_ray.models.in_place import CHANGED
from milan_ray.models.inputs import check_network, computes_in, prepare, runs_alone
from milan_ray.models.layouts import Layout
from milan_ray.models.lit_cells import LitPictures
from milan_ray.models.positions import Positions
from milan_ray.models.registry import BUILDING, OUTPUTS, ModelInput, ModelSpec
from milan_ray.models.state import Watched, drawing
from milan_ray.models.structure import Structure

_FIRST = 3  # images of the first batch
_SOME = 64  # more than any pass here takes
_OF_GRADIENTS = re.compile(r"requires?_? ?grad|grad_fn|[Ii]nference tensors|autograd")

Inputs = np.ndarray | tuple[torch.Tensor, ...]
"""Views uint8 (n, H, W, bands), or a generator's latents, each (n, …)."""


def establish(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout]:
    """Determines how a model's layers are read.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layers: Module paths.
        latents: For a generator: some of its inputs, each (n, …), n ≥ 1.
        positions: Whether positions are needed; else a layout with known axes is enough.

    Returns:
        Layer → layout.

    Raises:
        MilanError: A layer does not exist, run or cannot be read; the message gives the reason and what to do.
    """
    readings = examine(spec, model, layers, latents, positions)
    for reading in readings.values():
        if isinstance(reading, str):
            raise MilanError(reading)
    return {layer: reading for layer, reading in readings.items() if isinstance(reading, Layout)}


_DECISIVE = ("reading", "prefix_tokens", "channels_last", "inputs", "hidden", "activations", "max_batch")
_ESTABLISHED: WeakKeyDictionary[nn.Module, dict[object, Layout]] = WeakKeyDictionary()


def established(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout]:
    """Like :func:`establish`, but caches layouts per network in this process; for networks that do not change.

    Without ``positions``, layouts with known axes are enough. A feature set among the layers has the layout of the
    layer that it reads, with features in place of units.

    Raises:
        MilanError: As for :func:`establish`, or a feature set was made for a layer of another width.
    """
    known = _ESTABLISHED.setdefault(unwrap(model), {})
    declared = (*(getattr(spec, name) for name in _DECISIVE), spec.preprocess.view, positions)
    due = [layer for layer in dict.fromkeys(map(spec.base, layers)) if (layer, declared) not in known]
    if due:
        known |= {
            (layer, declared): layout for layer, layout in establish(spec, model, due, latents, positions).items()
        }
    return with_features(spec, {layer: known[spec.base(layer), declared] for layer in layers})


def with_features(spec: ModelSpec, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Puts features in place of units in the layouts of feature sets.

    Args:
        spec: The model.
        layouts: Layer or feature set → layout of the layer.

    Raises:
        MilanError: A feature set was made for a layer of another width.
    """
    return {
        layer: spec.features[layer].layout(layout, spec.name) if layer in spec.features else layout
        for layer, layout in layouts.items()
    }


def examine(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout | str]:
    """Like :func:`establish`, but returns a message in place of the layout of a layer that cannot be read.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layers: Module paths.
        latents: For a generator: some of its inputs.
        positions: Whether positions are needed; else a layout with known axes is enough.

    Raises:
        MilanError: A layer does not exist, or the model does not run.
    """
    return _Examination(spec, unwrap(model), tuple(dict.fromkeys(layers)), latents, positions).results()


class _Examination:
    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        layers: tuple[str, ...],
        latents: tuple[torch.Tensor, ...] | None,
        positions: bool,
    ) -> None:
        self._spec, self._model, self._layers, self._latents = spec, model, layers, latents
        self._places = find_places(model, layers)
        self._structure = Structure(model, self._tensor)
        self._pictures = LitPictures(spec.preprocess.view.shape, spec.bands or 3)
        self._alone = runs_alone(model)
        self._most = spec.max_batch or _SOME
        self._dtype = computes_in(model)
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        show = None if latents is not None else self._show
        self._positions = Positions(
            spec, model, self._structure, self._pictures, show, self._most, self._alone, positions
        )
        self._counts: dict[str, int] = {}  # layer → tensors it puts out
        self._missing: dict[str, str] = {}  # layer → why it puts out nothing
        self._changed: dict[str, str] = {}  # layer → how its output was changed later in the first pass

    @torch.inference_mode()
    def results(self) -> dict[str, Layout | str]:
        if not self._layers:
            return {}
        check_network(self._spec.name, self._model)
        size = min(_FIRST, self._most)
        inputs = self._inputs(size)
        self._structure.alone = size == 1
        order = [1, 0][: size - 1] or [0]  # fewer images, in another order
        watched = Watched(self._model, self._device)
        with BUILDING:  # networks that are built meanwhile draw random numbers
            with self._structure.recording():
                first, often = self._run(inputs, watch=True)
            counts = dict(self._counts)
            with self._structure.recording(smaller=True):
                second, fewer = self._run(_take(inputs, order))
            parts = {
                layer: (often[layer], fewer.get(layer, 0), counts.get(layer), self._counts.get(layer))
                for layer in often
            }
            third = [*order[:1], size - 1] if size > 1 and len(order) > 1 else order
            again, _ = self._run(_take(inputs, third))  # one of them in the same place, with another image
            unsteady = self._unsteady(watched, _take(inputs, order))
        if isinstance(unsteady, str):  # no more passes
            return {layer: self._missing.get(layer, unsteady) for layer in self._layers}
        batches: dict[str, int | str] = {}
        for layer in self._layers:
            if layer in self._missing:
                batches[layer] = self._missing[layer]
                continue
            if layer in unsteady:
                batches[layer] = self._random(layer)
                continue
            axis = self._batch_axis(layer, first[layer].shape, second[layer].shape, size, len(order), parts[layer])
            if isinstance(axis, int) and size > 1 and not self._alone:
                one, two, three = (output[layer].movedim(axis, 0) for output in (first, second, again))
                if not agree(two[:1], three[:1], one, exactly(self._dtype)):
                    axis = self._why_unequal(layer, two, axis, inputs, order)
                elif not agree(one[order], two, one, about(self._dtype, self._device)):
                    axis = self._why_other_values(layer, one, axis, inputs)
            if isinstance(axis, int):
                axis = self._why_no_values(layer, first[layer].movedim(axis, 0)) or axis
            batches[layer] = axis
        self._positions.look(list(self._places.values()))
        readings: dict[str, Layout | str] = {}
        for layer in self._layers:
            axis = batches[layer]
            if isinstance(axis, str):
                readings[layer] = axis
                continue
            reading = self._positions.read(layer, self._places[layer], first[layer].shape, axis)
            if isinstance(reading, Layout):
                calls = often[layer] if self._places[layer].call is None else 0
                remarks = [reading.remark, self._remark(layer, often[layer])]
                reading = replace(reading, remark="; ".join(filter(None, remarks)), calls=calls)
            readings[layer] = reading
        return readings

    # The passes

    def _inputs(self, count: int) -> Inputs:
        """Random pictures, or a generator's first inputs."""
        if self._latents is None:
            return dimmed(self._pictures.random(count))
        rows = [number % len(self._latents[0]) for number in range(count)]
        return tuple(tensor[rows] for tensor in self._latents)

    def _prepared(self, inputs: Inputs) -> ModelInput:
        tensors = inputs if isinstance(inputs, tuple) else (torch.from_numpy(inputs),)
        return prepare(self._spec, self._model, *(tensor.to(self._device) for tensor in tensors))

    def _run(self, inputs: Inputs, watch: bool = False) -> tuple[dict[str, torch.Tensor], Mapping[str, int]]:
        """The layers' outputs, and how often each ran."""
        spec = self._spec
        with LayerTap(self._model, self._layers, spec.hidden, spec.activations, lenient=True, watch=watch) as tap:
            with self._explaining(inputs):
                outputs = tap(self._prepared(inputs))
            self._changed |= tap.changed
            self._missing |= tap.missing
            self._counts |= tap.counts
            return outputs, dict(tap.calls)

    def _show(self, pictures: np.ndarray) -> None:
        with self._explaining(pictures):
            call(self._model, self._prepared(pictures))

    @contextmanager
    def _explaining(self, inputs: Inputs) -> Iterator[None]:
        """Converts any exception that a user's model raises on a test batch into a MilanError."""
        try:
            yield
        except MilanError:
            raise
        except Exception as error:
            shapes = [tuple(part.shape) for part in (inputs if isinstance(inputs, tuple) else (inputs,))]
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            if _OF_GRADIENTS.search(str(error)):
                raise MilanError(
                    f"{self._spec.name} computes gradients in its forward pass ({why}), which networks are dissected "
                    "without: give it without that part, or a part of it that comes before."
                ) from error
            raise MilanError(
                f"{self._spec.name} does not run on a test batch of {', '.join(map(str, shapes))} ({why}): see that "
                "its view, inputs= and number type fit it, that all of it is on one device, and that it takes any "
                "batch size (else register it with max_batch=1)."
            ) from error

    def _tensor(self, output: object) -> torch.Tensor | None:
        """The tensor in any module's output; ignores errors of hidden=, which is written only for the given layers."""
        tensor = first_tensor(output)
        if self._spec.hidden is not None:
            with suppress(Exception):
                tensor = self._spec.hidden(output)
        return tensor if tensor is not None and no_activations(tensor) is None else None

    # The images

    def _where(self, layer: str) -> str:
        return f"layer {layer!r} of {self._spec.name}"

    def _batch_axis(
        self,
        layer: str,
        first: torch.Size,
        second: torch.Size,
        size: int,
        smaller: int,
        often: tuple[int, int, int | None, int | None],
    ) -> int | str:
        """The axis that follows the number of images, or a message that explains why there is none."""
        told = self._spec.reading.batch_axis
        puts_out = f"{self._where(layer)} puts out {tuple(first)} for {size} images"
        if told is not None:
            axis = told + len(first) if told < 0 else told
            fits = 0 <= axis < len(first) == len(second) and (first[axis], second[axis]) == (size, smaller)
            return axis if fits else f"{puts_out}: batch_axis={told} does not count them; correct that."
        if size == smaller:  # images run one at a time
            return 0 if len(first) and first[0] == 1 else f"{puts_out}, without an axis for them; choose another layer."
        if (in_parts := self._why_in_parts(layer, often, smaller)) is not None:
            return in_parts
        if len(first) != len(second):
            return f"{puts_out} and {tuple(second)} for {smaller}; choose another layer."
        changed = [axis for axis in range(len(first)) if first[axis] != second[axis]]
        if not changed:
            return f"{puts_out}, and the same for {smaller}: it does not depend on them; choose another layer."
        axis = changed[0]
        if len(changed) == 1 and (first[axis], second[axis]) == (size, smaller):
            return axis
        if len(changed) == 1 and first[axis] * smaller == second[axis] * size:
            parent = layer.rpartition(".")[0]
            return (
                f"{puts_out}: axis {axis} holds {first[axis] // size} rows per image (windows, tokens or heads stacked "
                "on the batch), so that images cannot be told apart; choose a layer around it"
                f"{f', as {parent!r}' if parent else ''}."
            )
        return f"{puts_out} and {tuple(second)} for {smaller}: no axis counts them; choose another layer."

    def _why_in_parts(self, layer: str, often: tuple[int, int, int | None, int | None], smaller: int) -> str | None:
        """Why a layer cannot be read, where it runs, or puts out tensors, once per part of the batch; else None."""
        size, (runs, fewer, tensors, less) = smaller + 1, often
        if runs != fewer:
            return (
                f"{self._where(layer)} runs {runs} times for {size} images and {fewer} times for {smaller}: it gets a "
                "part of them at a time (a loop over images, a batch in pieces), or runs as often as they need; choose "
                "a layer around it."
            )
        if tensors != less:
            return (
                f"{self._where(layer)} puts out {tensors} tensors for {size} images and {less} for {smaller}, each for "
                "a part of them: choose a layer around it, or register the model with hidden=, a function that puts "
                "them together."
            )
        return None

    def _why_no_values(self, layer: str, values: torch.Tensor) -> str | None:
        """Why a layer's values, images first, cannot be used; None where they can."""
        change = self._changed.get(layer)
        if change not in (None, CHANGED):
            return (
                f"{self._where(layer)} cannot be read: {change}; read it before that by activations='pre', or choose "
                "another layer."
            )
        if len(values) < 2 or not bool(values.isfinite().any()) or not bool(values.any()):
            return None  # dead units are counted and reported at the end
        values = values.double()
        near = 4 * torch.finfo(self._dtype).eps if self._dtype in (torch.float32, torch.float64) else 0.0
        if bool(((values - values[:1]).abs().nan_to_num() <= near * values.abs().nan_to_num()).all()):
            return (
                f"{self._where(layer)} puts out the same for all images (positions, queries or other weights, or a "
                "function at its limit): choose another layer."
            )
        return None

    def _unsteady(self, watched: Watched, inputs: Inputs) -> set[str] | str:
        """The layers that depend on random numbers, or a message where passes change the network or may be random."""
        if changed := watched.changed():
            watched.put_back()
            return (
                f"{self._spec.name} changes {changed[0]!r} in its forward pass, so that results would depend on the "
                "images before: freeze it (eval mode, or as the network's own documents say)."
            )
        watched.put_back()
        if (which := watched.drew_elsewhere) is not None:
            return (
                f"{self._spec.name} draws from {which} random numbers in its forward pass, so that results may be "
                "others each time: switch that off in the model (eval mode)."
            )
        if not watched.drew:
            return set()
        outputs = []
        for highest in (False, True):
            with drawing(highest):
                outputs.append(self._run(inputs)[0])
        low, high = outputs
        return {
            layer
            for layer in low.keys() | high.keys()
            if layer not in low
            or layer not in high
            or not agree(low[layer], high[layer], low[layer], exactly(self._dtype))
        }

    def _random(self, layer: str) -> str:
        return (
            f"{self._where(layer)} puts out something else when the same images are shown again: dropout, random depth "
            "or random masking is on; switch it off in the model (eval mode, mask_ratio=0), or choose an earlier layer."
        )

    def _why_unequal(self, layer: str, two: torch.Tensor, axis: int, inputs: Inputs, order: list[int]) -> str:
        """Why an image has other values in the same place when another image changes."""
        repeated, _ = self._run(_take(inputs, order))
        if not agree(two, repeated[layer].movedim(axis, 0), two, exactly(self._dtype)):
            return self._random(layer)
        return self._why_other_values(layer, two, axis, _take(inputs, order))

    def _why_other_values(self, layer: str, one: torch.Tensor, axis: int, inputs: Inputs) -> str:
        """Why an image has other values in another batch."""
        turned = [*range(1, len(one)), 0]
        moved, _ = self._run(_take(inputs, turned))
        if not agree(one[turned], moved[layer].movedim(axis, 0), one, about(self._dtype, self._device)):
            return (
                f"{self._where(layer)} has as many rows on axis {axis} as there are images, but they do not follow the "
                "images' order: it mixes them; choose another layer."
            )
        norms = (
            path
            for path, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        )
        norm = next(norms, None)
        return (
            f"{self._where(layer)} puts out other values for an image beside other images"
            f"{f' ({norm} uses statistics of the batch)' if norm else ''}, so that results would depend on the "
            "batches: give the model fixed statistics (track_running_stats=True, eval mode), register it with "
            "max_batch=1 so that images run alone, or choose an earlier layer."
        )

    def _remark(self, layer: str, often: int) -> str:
        remarks = []
        if often > 1 and self._places[layer].call is None:
            remarks.append(f"runs {often} times in a forward pass, and this is its last; {layer}@1 is its first")
        if layer == OUTPUTS and OWN_OUTPUT in named_layers(self._model):
            remarks.append(f"is the module of that name; the model's own output is {OWN_OUTPUT!r}")
        if (count := self._counts.get(layer, 1)) > 1:
            remarks.append(f"puts out {count} tensors, and this is the first; hidden= takes another")
        if self._changed.get(layer) == CHANGED:
            remarks.append(CHANGED)
        return "; ".join(remarks)


def _take(inputs: Inputs, rows: list[int]) -> Inputs:
    return inputs[rows] if isinstance(inputs, np.ndarray) else tuple(tensor[rows] for tensor in inputs)
