"""Finding out how a model's layers are read, by a few small forward passes, before they are relied on.

1. Three pictures, then two of them in another order, twice: the axis that follows the images is the batch, and an
   image's values must be the same beside other images. This unmasks windows stacked on the batch axis, statistics of
   the batch, random masking and dropout that is left on.
2. What the layer's last linear map, convolution or norm says of its features is the axis of the units.
3. Grey pictures with one lit patch each: a layer answers there. This confirms the positions, or finds their order.

Fourteen pictures in all; layers whose tokens come in an unknown order take up to thirty more. Where a layer answers too
faintly, because what is before it mixes all positions, patches are lit in the maps of an earlier layer whose positions
are clear, in place of the picture: up to 49 more for each such layer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.batch_mates import about, agree, dimmed, exactly
from milan_ray.models.candidates import Candidate, candidates, known_orders
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
from milan_ray.models.layouts import UNSAID, Layout, grids
from milan_ray.models.lit_cells import Evidence, LitPictures
from milan_ray.models.registry import BUILDING, OUTPUTS, ModelInput, ModelSpec
from milan_ray.models.state import Watched, drawing
from milan_ray.models.structure import Key, Structure, Units

_FIRST = 3  # images of the first batch
_TOGETHER = 8  # pictures of a pass with lit patches
_SOME = 64  # more than any pass here takes
_FEW = 8  # positions a side, where a patch may lie between those that a later layer takes
_MOST_OWN = 3  # ways of reading a layer that are tried by lighting its own maps
_MOST_SOURCES = 6  # earlier layers in which patches are lit for the sake of one layer
_CLEARLY = 0.02  # by which a less likely way to read positions must be better than a likelier one
_OF_GRADIENTS = re.compile(r"requires?_? ?grad|grad_fn|[Ii]nference tensors|autograd")
_SAY = "say how it is read by units_axis=, batch_axis=, grid= or prefix_tokens= (docs/layouts.md)"

Inputs = np.ndarray | tuple[torch.Tensor, ...]
"""Views uint8 (n, H, W, bands), or a generator's latents, each (n, …)."""


def establish(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout]:
    """Finds out how a model's layers are read.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layers: Module paths.
        latents: Of a generator: some of its inputs, each (n, …), n ≥ 1.
        positions: Whether positions matter; else a layout whose axes are known alone will do.

    Returns:
        Layer → layout.

    Raises:
        MilanError: A layer does not exist or run, or cannot be read; the text says why and what to do.
    """
    found = examine(spec, model, layers, latents, positions)
    for reading in found.values():
        if isinstance(reading, str):
            raise MilanError(reading)
    return {layer: reading for layer, reading in found.items() if isinstance(reading, Layout)}


_DECISIVE = ("reading", "prefix_tokens", "channels_last", "inputs", "hidden", "activations", "max_batch")
_ESTABLISHED: WeakKeyDictionary[nn.Module, dict[object, Layout]] = WeakKeyDictionary()


def established(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout]:
    """As :func:`establish`, once per network in this process: for networks that nobody changes.

    Without ``positions`` layouts whose axes are known alone will do.

    Raises:
        MilanError: As :func:`establish`.
    """
    known = _ESTABLISHED.setdefault(unwrap(model), {})
    said = (*(getattr(spec, name) for name in _DECISIVE), spec.preprocess.view, positions)
    due = [layer for layer in dict.fromkeys(layers) if (layer, said) not in known]
    if due:
        known |= {(layer, said): layout for layer, layout in establish(spec, model, due, latents, positions).items()}
    return {layer: known[layer, said] for layer in layers}


def examine(
    spec: ModelSpec,
    model: nn.Module,
    layers: Sequence[str],
    latents: tuple[torch.Tensor, ...] | None = None,
    positions: bool = True,
) -> dict[str, Layout | str]:
    """As :func:`establish`, but says of each layer that cannot be read why, in place of its layout.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layers: Module paths.
        latents: Of a generator: some of its inputs.
        positions: Whether positions matter; else a layout whose axes are known alone will do.

    Raises:
        MilanError: A layer does not exist, or the model does not run.
    """
    return _Examination(spec, unwrap(model), tuple(dict.fromkeys(layers)), latents, positions).results()


@dataclass(frozen=True)
class _Answers:
    """How calls answer to lit patches.

    Attributes:
        calls: Call → axis taken for the units (images first) → float64 (pictures, positions…).
        pictures: Where the patches are.
    """

    calls: Mapping[Key, Mapping[int, torch.Tensor]]
    pictures: LitPictures


class _Examination:
    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        layers: tuple[str, ...],
        latents: tuple[torch.Tensor, ...] | None,
        positions: bool,
    ) -> None:
        self._positions = positions
        self._spec, self._model, self._layers, self._latents = spec, model, layers, latents
        self._places = find_places(model, layers)
        self._structure = Structure(model, self._tensor)
        self._pictures = LitPictures(spec.preprocess.view.shape, spec.bands or 3)
        self._wide = LitPictures(spec.preprocess.view.shape, spec.bands or 3, size=2)
        self._alone = runs_alone(model)
        self._most = spec.max_batch or _SOME
        self._dtype = computes_in(model)
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        self._responses: dict[Key, dict[int, torch.Tensor]] = {}
        self._answers: dict[Key | None, _Answers] = {}  # to patches in a call's maps, or in pictures
        self._looked: dict[Key, tuple[int, Candidate | None]] = {}  # what is clear of a call from so many of them
        self._orders: list[tuple[tuple[int, int], tuple[int, ...]]] | None = None
        self._counts: dict[str, int] = {}  # layer → tensors it puts out
        self._missing: dict[str, str] = {}  # layer → why it puts out nothing
        self._changed: dict[str, str] = {}  # layer → what became of what it put out, in the first pass

    @torch.inference_mode()
    def results(self) -> dict[str, Layout | str]:
        if not self._layers:
            return {}
        check_network(self._spec.name, self._model)
        size = min(_FIRST, self._most)
        inputs = self._inputs(size)
        self._structure.alone = size == 1
        order = [1, 0][: size - 1] or [0]  # fewer, in another order, beside others
        watched = Watched(self._model, self._device)
        with BUILDING:  # what is built meanwhile draws random numbers
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
            again, _ = self._run(_take(inputs, third))  # one of them in its place, beside another
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
        if self._latents is None:
            keys = {self._structure.key(self._places[layer]) for layer in self._layers}
            shapes = {self._structure.calls[key].shape for key in keys if key is not None}
            alike = {key for key, call_ in self._structure.calls.items() if call_.shape in shapes}
            self._responses = self._respond(self._pictures.patches(), alike)
        found: dict[str, Layout | str] = {}
        for layer in self._layers:
            axis = batches[layer]
            reading = axis if isinstance(axis, str) else self._read(layer, first[layer].shape, axis)
            if isinstance(reading, Layout):
                calls = often[layer] if self._places[layer].call is None else 0
                reading = replace(reading, remark=self._remark(layer, often[layer]), calls=calls)
            found[layer] = reading
        return found

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

    @contextmanager
    def _explaining(self, inputs: Inputs) -> Iterator[None]:
        """Turns whatever a user's model raises on a test batch into a sentence."""
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
        """The tensor in what any module puts out: a user's hidden= is written for the layers asked for alone."""
        tensor = first_tensor(output)
        if self._spec.hidden is not None:
            with suppress(Exception):
                tensor = self._spec.hidden(output)
        return tensor if tensor is not None and no_activations(tensor) is None else None

    def _respond(
        self, pictures: np.ndarray, wanted: set[Key], source: tuple[Key, Candidate, LitPictures] | None = None
    ) -> dict[Key, dict[int, torch.Tensor]]:
        """How strongly calls answer to pictures, compared with plain grey.

        Args:
            pictures: uint8 (n, H, W, bands).
            wanted: The calls.
            source: An earlier call, how it is read, and where patches are lit in its maps; all pictures are the same.

        Returns:
            Call → axis taken for the units (images first) → float64 (pictures, positions…).
        """
        found: dict[Key, list[dict[int, torch.Tensor]]] = {}
        numbers: Counter[nn.Module] = Counter()

        def after(module: nn.Module, args: object, output: object) -> None:
            numbers[module] += 1
            key = module, numbers[module]
            tensor = self._tensor(output)
            axis = self._structure.image_axis(key) if key in wanted else None
            if axis is None or tensor is None or tensor.ndim not in (3, 4):
                return
            values = (tensor.dequantize() if tensor.is_quantized else tensor).movedim(axis, 0).float()
            values = values.nan_to_num(posinf=0, neginf=0)
            if one_by_one:
                squares = (values - plain_values.setdefault(key, values)).square()
                if not shown:
                    return
            else:
                squares = (values[1:] - values[:1]).square()
            sums = {units: squares.sum(units).sqrt().double().cpu() for units in range(1, values.ndim)}
            found.setdefault(key, []).append(sums)

        shown: list[int] = []  # pictures of this pass
        one_by_one, plain_values = self._most == 1, dict[Key, torch.Tensor]()

        def light(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
            assert source is not None
            key, way, places = source
            axis = self._structure.image_axis(key)
            if axis is None or key != (module, numbers[module] + 1):
                return None
            cells = places.lit(*way.grid)
            if not (one_by_one and shown):
                cells = torch.cat([torch.zeros_like(cells[:1]), cells[shown]])  # the first image stays as it is
            else:
                cells = cells[shown]
            return way.lit(output.movedim(axis, 0), cells).movedim(0, axis)

        handles = [] if source is None else [source[0][0].register_forward_hook(light)]
        handles += [module.register_forward_hook(after) for module in {module for module, _ in wanted}]
        some = 1 if self._alone or one_by_one else min(self._most, _TOGETHER) - 1
        plain = self._pictures.grey(1) if source is None else pictures[:1]
        try:
            for start in range(-some if one_by_one else 0, len(pictures), some):
                numbers.clear()
                shown[:] = range(max(start, 0), min(start + some, len(pictures)))
                batch = pictures[shown] if one_by_one and shown else np.concatenate([plain, pictures[shown]])
                with self._explaining(batch):
                    call(self._model, self._prepared(batch))
        finally:
            for handle in handles:
                handle.remove()
        return {
            key: {axis: torch.cat([part[axis] for part in parts]) for axis in parts[0]}
            for key, parts in found.items()
            if sum(len(part[min(part)]) for part in parts) == len(pictures)  # else it gets the batch in pieces
        }

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
        """The axis that follows the images; a sentence where there is none."""
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
        """Why a layer gets or puts out a part of the images, where it does so as often as there are images."""
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
        """Why values, images first, say nothing of images; None where they do."""
        change = self._changed.get(layer)
        if change not in (None, CHANGED):
            return (
                f"{self._where(layer)} cannot be read: {change}; read it before that by activations='pre', or choose "
                "another layer."
            )
        if len(values) < 2 or not bool(values.isfinite().any()) or not bool(values.any()):
            return None  # what is dead is counted and said in the end
        values = values.double()
        near = 4 * torch.finfo(self._dtype).eps if self._dtype in (torch.float32, torch.float64) else 0.0
        if bool(((values - values[:1]).abs().nan_to_num() <= near * values.abs().nan_to_num()).all()):
            return (
                f"{self._where(layer)} puts out the same for all images (positions, queries or other weights, or a "
                "function at its limit): choose another layer."
            )
        return None

    def _unsteady(self, watched: Watched, inputs: Inputs) -> set[str] | str:
        """The layers that random numbers decide; a sentence where passes change the network, or may be random."""
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
        found = []
        for highest in (False, True):
            with drawing(highest):
                found.append(self._run(inputs)[0])
        low, high = found
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
        """Why an image has other values in its place beside another one."""
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

    # Units and positions

    def _read(self, layer: str, shape: torch.Size, batch: int) -> Layout | str:
        """A layer's layout; a sentence where it cannot be found out."""
        per_image = tuple(size for axis, size in enumerate(shape) if axis != batch)
        puts_out = f"{self._where(layer)} puts out {per_image} per image"
        if not 1 <= len(per_image) <= 3:
            return f"{puts_out}: units are read from vectors, tokens and maps; choose another layer."
        key, told = self._structure.key(self._places[layer]), self._spec.reading
        units = self._structure.units(key, batch, per_image)
        if told.units_axis is not None:
            axis = told.units_axis + len(shape) if told.units_axis < 0 else told.units_axis
            if not 0 <= axis < len(shape) or axis == batch:
                said = f"units_axis={told.units_axis} is none of the others"
                return f"{puts_out}, the images on axis {batch}: {said}; correct that."
            units = Units(axis + (axis < batch), certain=True)
        elif len(per_image) == 3 and self._spec.is_channels_last(layer):
            units = Units(3, certain=True)
        longer = [axis for axis, size in enumerate(per_image, 1) if size > 1] if len(per_image) > 1 else [1]
        if len(longer) == 1 and units.axis in (None, *longer) and told.grid is None and not told.prefix_tokens:
            return Candidate(longer[0], (1, 1)).layout(per_image, batch, "its only axis besides the images")
        view, seen = self._pictures.view, self._structure.map_sizes(key)
        ways = list(candidates(per_image, units, view, seen, self._spec.prefix_tokens, told))
        if not ways and (told.grid, told.prefix_tokens) != (None, None):
            said = f"grid={told.grid}" if told.grid is not None else f"prefix_tokens={told.prefix_tokens}"
            return f"{puts_out}, which does not agree with {said}; correct that, or choose another layer."
        if ways and (told.grid is not None or (told.units_axis is not None and len(per_image) == 3)):
            return ways[0].layout(per_image, batch, "what was said of it")
        if len(per_image) == 2 and units.axis is None and per_image in grids(math.prod(per_image), view):
            return (
                f"{puts_out}, which looks like one map without an axis of units: add it by hidden=, as in lambda "
                f"output: output[:, None], or {_SAY}."
            )
        clear = None if key is None else self._clear(ways, _Answers(self._responses, self._pictures), key)
        turned = ways and key is not None and self._answers_turned(clear or ways[0], key)
        if clear is not None and not turned:
            return clear.layout(per_image, batch, "lit patches")
        best, evidence = self._best([way for way in ways if not units.certain or way.units_axis == units.axis], key)
        confirmed = best is ways[0] if ways and evidence is not None and evidence.confirms else False
        if best is not None and confirmed and best.certain and not turned:
            return best.layout(per_image, batch, "lit patches")
        strange = turned or (evidence is not None and evidence.contradicts)
        if strange:
            ordered = self._ordered(ways, key) if key is not None and len(per_image) == 2 else None
            if ordered is not None:
                return ordered[0].layout(per_image, batch, "lit patches", ordered[1])
        elif ways and ways[0].certain and not (evidence is not None and evidence.vague):
            return ways[0].layout(per_image, batch, "the kind of its modules")
        shown = self._latents is None
        if shown and key is not None and (passed_on := self._from_sources(key, ways)) is not None:
            return passed_on[0].layout(per_image, batch, passed_on[1])
        if strange:
            return (
                f"{puts_out}, and a lit patch of the picture shows elsewhere in it: its positions come in an unknown "
                f"order; choose another layer, or {_SAY}."
            )
        own = self._spec.prefix_tokens
        if ways and units.certain and ways[0].prefix == (own or 0) and ways[0].grid in seen:
            faint = own is not None and (evidence is None or math.prod(ways[0].grid) < _FEW**2)
            if faint or (evidence is not None and evidence.confirms):
                return ways[0].layout(per_image, batch, "the model's own maps and number of prefix tokens")
        if shown and key is not None and (passed_on := self._from_itself(key, ways)) is not None:
            return passed_on[0].layout(per_image, batch, passed_on[1])
        if not self._positions and units.certain and units.axis is not None:
            return Candidate(units.axis, (1, 1)).layout(per_image, batch, "the kind of its modules")
        return (
            f"{puts_out}, and neither its modules nor lit patches of a picture tell its units from its positions; "
            f"choose another layer, or {_SAY}."
        )

    def _best(self, ways: Sequence[Candidate], key: Key | None) -> tuple[Candidate | None, Evidence | None]:
        """The way that the lit pictures speak for most; of equals the likeliest."""
        best: Candidate | None = None
        most: Evidence | None = None
        responses = {} if key is None else self._responses.get(key, {})
        for way in ways:
            evidence = None
            if way.units_axis in responses:
                evidence = self._pictures.weigh(way.cells(responses[way.units_axis]))
            if evidence is None:
                continue
            if most is None or (evidence.confirms and (not most.confirms or evidence.hit > most.hit + _CLEARLY)):
                best, most = way, evidence
        return best, most

    def _clear(self, ways: Sequence[Candidate], answers: _Answers, key: Key) -> Candidate | None:
        """The way in which a call answers clearly, and more exactly than in any other; None where there is none."""
        responses = answers.calls.get(key, {})
        weighed = [
            (evidence, way)
            for way in ways
            if way.units_axis in responses
            and (evidence := answers.pictures.weigh(way.cells(responses[way.units_axis]))) is not None
        ]
        best, way = max(weighed, key=lambda item: item[0].hit, default=(None, None))
        if best is None or way is None or not best.clear:
            return None
        return way if all(way.reads_as(other) or best.beats(evidence) for evidence, other in weighed) else None

    def _from_sources(self, key: Key, ways: Sequence[Candidate]) -> tuple[Candidate, str] | None:
        """What a call says of patches that are lit in the maps of earlier ones, the nearest first; and how it is known.

        Sources are calls that answer clearly to lit pictures, or to patches in other sources.
        """
        calls = self._structure.calls
        names = {module: path for path, module in named_layers(self._model).items()}
        if not self._answers:
            every = {other for other in calls if self._structure.image_axis(other) is not None}
            self._answers[None] = _Answers(self._respond(self._pictures.patches(), every), self._pictures)
        before = sorted(
            (other for other, call_ in calls.items() if call_.bare and call_.ended < calls[key].ended),
            key=lambda other: -calls[other].ended,
        )
        lit = [source for source in before if source in self._answers]  # what was tried for other layers comes first
        for number in range(len(lit) + _MOST_SOURCES):
            if number >= len(lit):
                ready = (other for other in before if other not in self._answers and self._clear_way(other) is not None)
                source = next(ready, None)
                if source is None:
                    return None
                self._light(source)
                lit.append(source)
            way = self._clear(ways, self._answers[lit[number]], key)
            if way is not None:
                return way, f"patches lit in {names[lit[number][0]]}"
        return None

    def _light(self, source: Key) -> None:
        """Notes how later calls answer to patches that are lit in a call's maps."""
        calls, way = self._structure.calls, self._clear_way(source)
        assert way is not None
        later = {other for other in calls if calls[other].ended > calls[source].started}
        pictures = self._wide if min(way.grid) <= _FEW else self._pictures
        picture = pictures.random(1).repeat(len(pictures.patches()), 0)
        self._answers[source] = _Answers(self._respond(picture, later, (source, way, pictures)), pictures)

    def _clear_way(self, key: Key) -> Candidate | None:
        """How a call's output is read, where it is clear by itself from what was lit so far; else None."""
        looked, way = self._looked.get(key, (0, None))
        batch, shape = self._structure.image_axis(key), self._structure.calls[key].shape
        if way is None and looked < len(self._answers) and batch is not None and shape.numel():
            per_image = tuple(size for axis, size in enumerate(shape) if axis != batch)
            units, seen = self._structure.units(key, batch, per_image), self._structure.map_sizes(key)
            if len(per_image) in (2, 3):
                found = candidates(per_image, units, self._pictures.view, seen, self._spec.prefix_tokens, UNSAID)
                ways = list(found)
                fresh = list(self._answers.values())[looked:]
                clear = (self._clear(ways, answers, key) for answers in fresh)
                way = next((one for one in clear if one is not None), None)
        self._looked[key] = len(self._answers), way
        return way

    def _from_itself(self, key: Key, ways: Sequence[Candidate]) -> tuple[Candidate, str] | None:
        """What later calls, whose positions are clear, say of patches that are lit in a call's own maps.

        A branch that answers to the picture faintly, as what attention adds to its tokens, is added at its positions.
        """
        calls = self._structure.calls
        if not calls[key].bare:
            return None
        names = {module: path for path, module in named_layers(self._model).items()}
        later = sorted(
            (other for other in calls if calls[other].ended > calls[key].ended), key=lambda o: calls[o].ended
        )
        clear = {other: way for other in later if (way := self._clear_way(other)) is not None}
        for way in ways[:_MOST_OWN] if clear else ():
            pictures = self._wide if min(way.grid) <= _FEW else self._pictures
            picture = pictures.random(1).repeat(len(pictures.patches()), 0)
            answers = _Answers(self._respond(picture, set(clear), (key, way, pictures)), pictures)
            for other, its in clear.items():
                if self._clear([its], answers, other) is not None:
                    return way, f"patches lit in it, which show in {names[other[0]]}"
        return None

    def _answers_turned(self, way: Candidate, key: Key) -> bool:
        """Whether a layer answers clearly at the mirror images of the lit patches, and less clearly at them."""
        responses = self._responses.get(key, {}).get(way.units_axis)
        own = None if responses is None else self._pictures.weigh(way.cells(responses))
        if responses is None or own is None:
            return False
        mirrored = (self._pictures.weigh(way.cells(responses).flip(dims)) for dims in ((1,), (2,), (1, 2)))
        return any(other.confirms and other.hit > 1.5 * own.hit for other in mirrored if other is not None)

    def _ordered(self, ways: Sequence[Candidate], key: Key) -> tuple[Candidate, tuple[int, ...]] | None:
        """The order of tokens that do not come row by row; None where it cannot be told.

        Orders that the model itself knows, or that were found for other layers, are taken where the layer answers to
        the lit pictures in them; else each cell's token is looked for.
        """
        plain = [
            way for way in ways if not way.columns_first and not way.suffix and way.units_axis == ways[0].units_axis
        ]
        if self._orders is None:
            self._orders = list(known_orders(self._model))
        for way in plain:
            for grid, order in self._orders:
                if grid == way.grid and self._answers_in(way, order, key):
                    return way, order
        for way in plain:
            decoded = self._decoded(way, key)
            if decoded is not None and self._answers_in(way, decoded, key):
                self._orders.append((way.grid, decoded))
                return way, decoded
        return None

    def _answers_in(self, way: Candidate, order: tuple[int, ...], key: Key) -> bool:
        """Whether a layer answers at the lit patches when its tokens are taken in an order."""
        tokens = self._responses[key][way.units_axis][:, way.prefix :]
        cells = tokens[:, torch.argsort(torch.tensor(order))].unflatten(1, way.grid)
        evidence = self._pictures.weigh(cells)
        return evidence is not None and evidence.confirms

    def _decoded(self, way: Candidate, key: Key) -> tuple[int, ...] | None:
        """Each token's cell, by pictures that number the cells; None where tokens do not answer to one cell each."""
        (height, width), view = way.grid, self._pictures.view
        if height > view[0] or width > view[1]:
            return None
        responses = self._respond(self._pictures.digits(way.grid), {key}).get(key)
        if responses is None:
            return None
        answers = responses[way.units_axis][:, way.prefix :].unflatten(0, (-1, 2))
        digits = (answers[:, 1] > answers[:, 0]).long()
        cells = (digits << torch.arange(len(digits))[:, None]).sum(0).tolist()
        return tuple(cells) if sorted(cells) == list(range(height * width)) else None


def _take(inputs: Inputs, rows: list[int]) -> Inputs:
    return inputs[rows] if isinstance(inputs, np.ndarray) else tuple(tensor[rows] for tensor in inputs)
