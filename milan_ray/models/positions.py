"""Finds the axis of a layer's output that counts units, and its positions, from its modules and from lit pictures.

The features of its modules come first. Then grey pictures with one lit patch each are shown: a layer responds at the
patch. Where it responds too faintly, patches are lit in the maps of an earlier layer whose positions are clear, and
last in its own maps while later layers are observed. :mod:`milan_ray.models.establish` runs this after it has found
the axis of the images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from milan_ray.models.candidates import Candidate, LayerOutput, candidates, known_orders
from milan_ray.models.hooks import Place, hooked, named_layers
from milan_ray.models.layouts import UNSAID, Layout, grids
from milan_ray.models.lit_cells import Evidence, LitPictures
from milan_ray.models.registry import ModelSpec
from milan_ray.models.structure import Key, Structure, Units
from milan_ray.models.unseen import padding, sides_unseen, still

_TOGETHER = 8  # pictures in a pass with lit patches
_FEW = 8  # positions per side at which a patch may lie between those that a later layer reads
_EARLY = 4  # first maps, at which a margin that is added to the pictures must show
_MOST_OWN = 3  # ways of reading a layer that are tried by lighting its own maps
_MOST_SOURCES = 6  # earlier layers in which patches are lit to read one layer
_CLEARLY = 0.02  # by which ``hit`` of a less likely way must exceed that of a likelier one
_SAY = "say how it is read by units_axis=, batch_axis=, grid= or prefix_tokens= (docs/layouts.md)"


@dataclass(frozen=True)
class _Answers:
    """Responses of calls to lit patches.

    Attributes:
        calls: Call → assumed axis of the units (images first) → float64 (pictures, positions…).
        pictures: The pictures, which define where the patches are.
    """

    calls: Mapping[Key, Mapping[int, torch.Tensor]]
    pictures: LitPictures


class Positions:
    """Determines the layouts of one model's layers, after a pass has been recorded.

    Args:
        spec: The model.
        model: The network.
        structure: The record of the pass.
        pictures: Test pictures for its view.
        show: Runs the network on pictures, uint8 (n, H, W, bands); None for generators, which take no pictures.
        most: Maximum number of pictures in a pass.
        alone: Whether a picture's values may depend on others in its pass; each is then shown with a grey one only.
        strict: Whether positions are needed; else a layout with known axes is enough.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        structure: Structure,
        pictures: LitPictures,
        show: Callable[[np.ndarray], None] | None,
        most: int,
        alone: bool,
        strict: bool,
    ) -> None:
        self._spec, self._model, self._structure, self._pictures = spec, model, structure, pictures
        self._show, self._most, self._alone, self._strict = show, most, alone, strict
        self._wide = LitPictures(spec.preprocess.view.shape, spec.bands or 3, size=2)
        self._first = _Answers({}, pictures)  # responses to lit pictures of calls shaped like the layers
        self._still: dict[Key, torch.Tensor] = {}  # call → which of its tokens respond to no picture
        self._margins = ""  # problem with the margins of pictures; empty for none
        self._answers: dict[Key | None, _Answers] = {}  # by call with lit maps; None: lit pictures
        self._looked: dict[Key, tuple[int, Candidate | None]] = {}  # answers examined; clear way, if any
        self._orders: list[tuple[tuple[int, int], tuple[int, ...]]] | None = None

    def look(self, places: Sequence[Place]) -> None:
        """Shows the lit pictures, and records the responses of layers that are read next."""
        if self._show is None:
            return
        calls = self._structure.calls
        keys = {self._structure.key(place) for place in places}
        shapes = {calls[key].shape for key in keys if key is not None}
        alike = {key for key, call_ in calls.items() if call_.shape in shapes}
        self._first = _Answers(self._respond(self._pictures.patches(), alike), self._pictures)
        counts = {size for shape in shapes if len(shape) == 3 for size in shape[1:]}
        of_tokens = {key for key, call_ in calls.items() if len(call_.shape) == 3 and counts & {*call_.shape[1:]}}
        of_maps = sorted((key for key, call_ in calls.items() if call_.of_maps), key=lambda key: calls[key].ended)
        margins = self._pictures.margins(*self._structure.map_sizes(None)[-1:])
        answers = self._respond(margins, alike | of_tokens | {*of_maps[:_EARLY]})
        if cut := sides_unseen([axes[min(axes)][1:] for axes in answers.values()]):
            self._margins = f"nothing in it depends on the {_listed(cut)} margin of the pictures, which it cuts off"
        for key in of_maps[:_EARLY]:
            if not self._margins and key in answers and (padded := padding(answers[key][1][0])):
                name = self._name(key)
                self._margins = f"positions on the {_listed(padded)} of {name!r} see no picture: it pads the pictures"
        for key in of_tokens & answers.keys():
            batch, shape = self._structure.image_axis(key), calls[key].shape
            per_image = tuple(size for number, size in enumerate(shape) if number != batch)
            axis = None if batch is None else self._structure.units(key, batch, per_image).axis
            silent = None if axis is None else still(answers[key][axis][0])
            if silent is not None:
                self._still[key] = silent

    def read(self, layer: str, place: Place, shape: torch.Size, batch: int) -> Layout | str:
        """A layer's layout, or a message that explains why it cannot be determined.

        Args:
            layer: The layer's name.
            place: Its module and call.
            shape: The shape of its output.
            batch: The axis of the output that counts images.
        """
        per_image = tuple(size for axis, size in enumerate(shape) if axis != batch)
        puts_out = f"layer {layer!r} of {self._spec.name} puts out {per_image} per image"
        if not 1 <= len(per_image) <= 3:
            return f"{puts_out}: units are read from vectors, tokens and maps; choose another layer."
        key, told = self._structure.key(place), self._spec.reading
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
        constant = self._constant(key, per_image, units.axis)
        own = self._spec.prefix_tokens if constant is None else int(constant.sum())
        ways = list(candidates(per_image, units, view, seen, own, told))
        output = LayerOutput(puts_out, key, batch, per_image, units)
        if told.grid is not None or told.prefix_tokens is not None or told.units_axis is not None:
            free = list(candidates(per_image, units, view, seen, own, UNSAID))
            if (answer := self._as_told(output, ways, free)) is not None:
                return answer
        if self._strict and self._margins and any(way.grid != (1, 1) for way in ways):
            return (
                f"{puts_out}, and {self._margins} by itself, so that its positions are not the view's: put that into "
                "the view, or say grid=."
            )
        if constant is not None and ways:
            ways = [way for way in ways if way.units_axis != units.axis or not way.among(constant)]
            if not ways:
                return (
                    f"{puts_out}, of which {int(constant.sum())} are the same for every picture, at places where "
                    f"nothing says why (the ends of rows?); choose another layer, or {_SAY}."
                )
        if len(per_image) == 2 and units.axis is None and per_image in grids(math.prod(per_image), view):
            return (
                f"{puts_out}, which looks like one map without an axis of units: add it by hidden=, as in lambda "
                f"output: output[:, None], or {_SAY}."
            )
        return self._as_shown(output, ways, own)

    def _as_told(self, output: LayerOutput, ways: list[Candidate], free: list[Candidate]) -> Layout | str | None:
        """The layout that the user declared; a message where the output contradicts it; None where it decides nothing.

        Args:
            output: The layer's output.
            ways: The ways to read it that agree with the declaration.
            free: The ways to read it without the declaration.
        """
        told = self._spec.reading
        if not ways and (told.grid, told.prefix_tokens) != (None, None):
            declared = f"grid={told.grid}" if told.grid is not None else f"prefix_tokens={told.prefix_tokens}"
            return f"{output.puts_out}, which does not agree with {declared}; correct that, or choose another layer."
        if not ways or (told.grid is None and (told.units_axis is None or len(output.per_image) != 3)):
            return None
        layout = output.layout(ways[0], "what was said of it")
        shown = self._clear(free, self._first, output.key)
        if shown is None or shown.reads_as(ways[0]) or shown.grid == (1, 1):
            return layout
        remark = f"{shown.grid[0]}×{shown.grid[1]} positions, units on axis {shown.units_axis}"
        return replace(layout, remark=f"is read as was said, though lit patches of a picture show in {remark}")

    def _as_shown(self, output: LayerOutput, ways: list[Candidate], own: int | None) -> Layout | str:
        """The layout according to lit patches and the network's modules, or a message where they leave it open.

        Args:
            output: The layer's output.
            ways: The ways to read it, likeliest first.
            own: Number of its tokens that are not positions; None where it is unknown.
        """
        key, units = output.key, output.units
        clear = self._clear(ways, self._first, key)
        turned = bool(ways) and self._answers_turned(clear or ways[0], key)
        if clear is not None and not turned:
            return output.layout(clear, "lit patches")
        best, evidence = self._best([way for way in ways if not units.certain or way.units_axis == units.axis], key)
        confirmed = best is ways[0] if ways and evidence is not None and evidence.confirms else False
        if best is not None and confirmed and best.certain and not turned:
            return output.layout(best, "lit patches")
        strange = turned or (evidence is not None and evidence.contradicts)
        if strange:
            ordered = self._ordered(ways, key) if key is not None and len(output.per_image) == 2 else None
            if ordered is not None:
                return output.layout(ordered[0], "lit patches", ordered[1])
        elif ways and ways[0].certain and not (evidence is not None and evidence.vague):
            return output.layout(ways[0], "the kind of its modules")
        if self._show is not None and key is not None and (passed_on := self._from_sources(key, ways)) is not None:
            return output.layout(*passed_on)
        if strange:
            return (
                f"{output.puts_out}, and a lit patch of the picture shows elsewhere in it: its positions come in an "
                f"unknown order; choose another layer, or {_SAY}."
            )
        if ways and units.certain and ways[0].prefix == (own or 0) and ways[0].grid in self._structure.map_sizes(key):
            faint = own is not None and (evidence is None or math.prod(ways[0].grid) < _FEW**2)
            if faint or (evidence is not None and evidence.confirms):
                return output.layout(ways[0], "the model's own maps and number of prefix tokens")
        if self._show is not None and key is not None and (passed_on := self._from_itself(key, ways)) is not None:
            return output.layout(*passed_on)
        if not self._strict and units.certain and units.axis is not None:
            return output.layout(Candidate(units.axis, (1, 1)), "the kind of its modules")
        return (
            f"{output.puts_out}, and neither its modules nor lit patches of a picture tell its units from its "
            f"positions; choose another layer, or {_SAY}."
        )

    def _constant(self, key: Key | None, per_image: tuple[int, ...], axis: int | None) -> torch.Tensor | None:
        """Which tokens are not positions: they are the same for every picture, in this call or an earlier one.

        Returns:
            bool (tokens,); None where there are none, or the call has no tokens.
        """
        if key is None or axis is None or len(per_image) != 2:
            return None
        ended, count = self._structure.calls[key].ended, per_image[2 - axis]
        before = [tokens for other, tokens in self._still.items() if self._structure.calls[other].ended <= ended]
        masks = [tokens for tokens in before if len(tokens) == count]
        return torch.stack(masks).any(0) if masks else None

    def _weighed(
        self, ways: Sequence[Candidate], answers: _Answers, key: Key | None
    ) -> list[tuple[Evidence, Candidate]]:
        """The evidence of a call's responses for each way to read it; leaves out ways without evidence."""
        responses = {} if key is None else answers.calls.get(key, {})
        found = (
            (answers.pictures.weigh(way.cells(responses[way.units_axis])), way)
            for way in ways
            if way.units_axis in responses
        )
        return [(evidence, way) for evidence, way in found if evidence is not None]

    def _best(self, ways: Sequence[Candidate], key: Key | None) -> tuple[Candidate | None, Evidence | None]:
        """The way with the strongest evidence from lit pictures; the likeliest of equal ones."""
        best: Candidate | None = None
        most: Evidence | None = None
        for evidence, way in self._weighed(ways, self._first, key):
            if most is None or (evidence.confirms and (not most.confirms or evidence.hit > most.hit + _CLEARLY)):
                best, most = way, evidence
        return best, most

    def _clear(self, ways: Sequence[Candidate], answers: _Answers, key: Key | None) -> Candidate | None:
        """The way in which a call responds clearly, and more precisely than in any other; None where there is none."""
        weighed = self._weighed(ways, answers, key)
        best, way = max(weighed, key=lambda item: item[0].hit, default=(None, None))
        if best is None or way is None or not best.clear:
            return None
        return way if all(way.reads_as(other) or best.beats(evidence) for evidence, other in weighed) else None

    def _confirmed(self, ways: Sequence[Candidate], answers: _Answers, key: Key | None) -> Candidate | None:
        """The way that the modules make certain, if a call responds more precisely in it than in others; else None."""
        weighed = self._weighed(ways, answers, key)
        own, way = next((item for item in weighed if item[1].certain), (None, None))
        if own is None or not own.confirms:
            return None
        return way if all(other is way or own.beats(evidence) for evidence, other in weighed) else None

    def _from_sources(self, key: Key, ways: Sequence[Candidate]) -> tuple[Candidate, str] | None:
        """Reads a call by patches lit in the maps of earlier calls, nearest first; also returns how that is known.

        Sources are calls that respond clearly to lit pictures, or to patches in other sources.
        """
        calls = self._structure.calls
        self._look_at_all()
        before = sorted(
            (other for other, call_ in calls.items() if call_.bare and call_.ended < calls[key].ended),
            key=lambda other: -calls[other].ended,
        )
        lit = [source for source in before if source in self._answers]  # those of other layers come first
        for number in range(len(lit) + _MOST_SOURCES):
            if number >= len(lit):
                untried = ((other, self._clear_way(other)) for other in before if other not in self._answers)
                source, its = next(((other, way) for other, way in untried if way is not None), (None, None))
                if source is None or its is None:
                    return None
                later = {other for other in calls if calls[other].ended > calls[source].started}
                self._answers[source] = self._lit(source, its, later)
                lit.append(source)
            answers = self._answers[lit[number]]
            way = self._clear(ways, answers, key) or self._confirmed(ways, answers, key)
            if way is not None:
                return way, f"patches lit in {self._name(lit[number])}"
        return None

    def _look_at_all(self) -> None:
        """Records, once, how all calls respond to lit pictures."""
        if not self._answers:
            every = {call_ for call_ in self._structure.calls if self._structure.image_axis(call_) is not None}
            self._answers[None] = _Answers(self._respond(self._pictures.patches(), every), self._pictures)

    def _lit(self, source: Key, way: Candidate, watched: set[Key]) -> _Answers:
        """Responses of calls to patches lit in another call's maps, which are read in a given way."""
        pictures = self._wide if min(way.grid) <= _FEW else self._pictures
        picture = pictures.random(1).repeat(len(pictures.patches()), 0)
        return _Answers(self._respond(picture, watched, (source, way, pictures)), pictures)

    def _name(self, key: Key) -> str:
        return next(path for path, module in named_layers(self._model).items() if module is key[0])

    def _clear_way(self, key: Key) -> Candidate | None:
        """The way to read a call's output, where patches lit so far make it clear; else None."""
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
        """Reads a call by patches lit in its own maps, from responses of later calls whose positions are clear.

        A branch that responds faintly to the picture, such as attention, is added to the tokens at its positions.
        """
        calls = self._structure.calls
        if not calls[key].bare:
            return None
        self._look_at_all()
        later = sorted(
            (other for other in calls if calls[other].ended > calls[key].ended), key=lambda o: calls[o].ended
        )
        clear = {other: way for other in later if (way := self._clear_way(other)) is not None}
        for way in ways[:_MOST_OWN] if clear else ():
            answers = self._lit(key, way, set(clear))
            for other, its in clear.items():
                if self._clear([its], answers, other) is not None:
                    return way, f"patches lit in it, which show in {self._name(other)}"
        return None

    def _answers_turned(self, way: Candidate, key: Key | None) -> bool:
        """Whether a layer responds at the mirror images of the lit patches, and more strongly than at the patches."""
        own = next((evidence for evidence, _ in self._weighed([way], self._first, key)), None)
        if own is None or key is None:
            return False
        responses = self._first.calls[key][way.units_axis]
        mirrored = (self._pictures.weigh(way.cells(responses).flip(dims)) for dims in ((1,), (2,), (1, 2)))
        return any(other.confirms and other.hit > 1.5 * own.hit for other in mirrored if other is not None)

    def _ordered(self, ways: Sequence[Candidate], key: Key) -> tuple[Candidate, tuple[int, ...]] | None:
        """Finds the order of tokens that do not come row by row; None where that fails.

        Orders that the model itself provides, or that were found for other layers, are used where the layer's responses
        to lit pictures confirm them. Otherwise, the token of each cell is searched for.
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
        """Whether a layer responds at the lit patches when its tokens are arranged in a given order."""
        tokens = self._first.calls[key][way.units_axis][:, way.prefix :]
        cells = tokens[:, torch.argsort(torch.tensor(order))].unflatten(1, way.grid)
        evidence = self._pictures.weigh(cells)
        return evidence is not None and evidence.confirms

    def _decoded(self, way: Candidate, key: Key) -> tuple[int, ...] | None:
        """Each token's cell, from pictures that number the cells; None where tokens do not match one cell each."""
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

    def _respond(
        self, pictures: np.ndarray, wanted: set[Key], source: tuple[Key, Candidate, LitPictures] | None = None
    ) -> dict[Key, dict[int, torch.Tensor]]:
        """Measures how strongly calls respond to pictures, compared with plain grey.

        Args:
            pictures: uint8 (n, H, W, bands).
            wanted: The calls.
            source: An earlier call, the way to read it, and the pictures that define where patches are lit in its maps;
                all ``pictures`` are then the same.

        Returns:
            Call → assumed axis of the units (images first) → float64 (pictures, positions…).
        """
        answers: dict[Key, list[dict[int, torch.Tensor]]] = {}
        numbers: Counter[nn.Module] = Counter()

        def after(module: nn.Module, args: object, output: object) -> None:
            numbers[module] += 1
            key = module, numbers[module]
            tensor = self._structure.tensor(output)
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
            answers.setdefault(key, []).append(sums)

        shown: list[int] = []  # pictures of this pass
        one_by_one, plain_values = self._most == 1, dict[Key, torch.Tensor]()

        def light(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
            assert source is not None
            key, way, places = source
            axis = self._structure.image_axis(key)
            if axis is None or key != (module, numbers[module] + 1):
                return None
            cells = places.lit(*way.grid)[shown]
            if not (one_by_one and shown):
                cells = torch.cat([cells.new_zeros(1, cells.shape[1]), cells])  # the first image stays as it is
            return way.lit(output.movedim(axis, 0), cells).movedim(0, axis)

        handles = [] if source is None else [source[0][0].register_forward_hook(light)]
        handles += [module.register_forward_hook(after) for module in {module for module, _ in wanted}]
        some = 1 if self._alone or one_by_one else min(self._most, _TOGETHER) - 1
        plain = self._pictures.grey(1) if source is None else pictures[:1]
        assert self._show is not None
        with hooked(handles):
            for start in range(-some if one_by_one else 0, len(pictures), some):
                numbers.clear()
                shown[:] = range(max(start, 0), min(start + some, len(pictures)))
                self._show(pictures[shown] if one_by_one and shown else np.concatenate([plain, pictures[shown]]))
        return {
            key: {axis: torch.cat([part[axis] for part in parts]) for axis in parts[0]}
            for key, parts in answers.items()
            if sum(len(part[min(part)]) for part in parts) == len(pictures)  # otherwise it gets the batch in pieces
        }


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
