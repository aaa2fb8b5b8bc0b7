"""A network in a notebook: exemplars and descriptions of a torch model, in this process, without Ray or run directory.

The same kernels as the jobs. What it finds stays in memory: meant for thousands of images and a few layers; whole
models over large probes are for the jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import polars as pl
import torch
from torch import nn

from milan_ray.captioner.encoder import Encoder, MaskedExemplars
from milan_ray.config import FLOAT32, Arithmetic
from milan_ray.device import resolve_device
from milan_ray.errors import MilanError, unknown_name
from milan_ray.exemplars import masks as packed_masks
from milan_ray.exemplars.forward import Forward, check_probe, pass_size, read_ahead, read_views
from milan_ray.exemplars.levels import in_words
from milan_ray.exemplars.shard import LayerState, LayerStates, StateConfig
from milan_ray.exemplars.ties import find_ties
from milan_ray.labelers.milan import MILAN
from milan_ray.library.captioner import Milan, encode_images
from milan_ray.library.probe_images import ProbeImages, check_axes, image_probe
from milan_ray.library.run_directory import Unit, as_frame
from milan_ray.models.establish import establish, with_features
from milan_ray.models.features.given import Features, feature_set
from milan_ray.models.hooks import find_layers, named_layers, unwrap
from milan_ray.models.inputs import check_network
from milan_ray.models.layouts import Layout, Reading
from milan_ray.models.registry import Activations, ModelSpec
from milan_ray.models.resolve import resolve_model
from milan_ray.models.view import Preprocess
from milan_ray.plugins import load_plugins
from milan_ray.probe.base import ImageProbe, ImageRef, Probe
from milan_ray.probe.files import tell_doubts
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS

_ALL_MAPS = 2**62  # bytes of maps that a layer's state may carry: all of them, there is but one pass


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's exemplars: k images of U units, best first, −1 where there are fewer.

    Attributes:
        ids: int64 (U, k).
        activations: float32 (U, k).
        levels: float32 (U,).
        masks: Packed bits of every (unit, rank) that has an image.
    """

    ids: np.ndarray
    activations: np.ndarray
    levels: np.ndarray
    masks: Mapping[tuple[int, int], bytes]


class Dissection:
    """What the units of a model's layers respond to, and, once asked, what a captioner says of them.

    Attributes:
        model: Name of the model.
        layers: Its layers that were looked at.
        skipped: One row per image that could not be used: image, reason.
    """

    def __init__(
        self, model: str, probe: ImageProbe, refs: Sequence[ImageRef], preprocess: Preprocess,
        exemplars: dict[str, _Layer], skipped: Sequence[tuple[ImageRef, str]],
    ) -> None:  # fmt: skip
        """Made by :func:`dissect`."""
        self.model, self.layers = model, list(exemplars)
        reasons = [(ref.location, why) for ref, why in skipped]
        self.skipped = pl.DataFrame(reasons, schema={"image": pl.String, "reason": pl.String}, orient="row")
        self._probe, self._refs, self._view, self._exemplars = probe, refs, preprocess.view, exemplars
        self._descriptions: dict[str, pl.DataFrame] = {}

    def units(self) -> list[tuple[str, int]]:
        """(layer, unit) of every unit that responds to an image at all."""
        return [
            (layer, unit)
            for layer, exemplars in self._exemplars.items()
            for unit in np.flatnonzero(exemplars.ids[:, 0] >= 0).tolist()
        ]

    @property
    def exemplars(self) -> pl.DataFrame:
        """One row per unit and exemplar: layer, unit, rank, image, activation, level η."""
        frames = []
        for layer, exemplars in self._exemplars.items():
            unit, rank = np.nonzero(exemplars.ids >= 0)
            frames.append(
                pl.DataFrame(
                    {
                        "layer": [layer] * len(unit),
                        "unit": unit.astype(np.int32),
                        "rank": rank.astype(np.int16),
                        "image": [self._refs[image].location for image in exemplars.ids[unit, rank].tolist()],
                        "activation": exemplars.activations[unit, rank],
                        "level": exemplars.levels[unit],
                    }
                )
            )
        return pl.concat(frames)

    @property
    def descriptions(self) -> pl.DataFrame:
        """What :meth:`describe` found, of all layers: columns as in the table of descriptions."""
        empty = as_frame(DESCRIPTIONS.schema.empty_table())
        return pl.concat([empty, *(self._descriptions[layer] for layer in self.layers if layer in self._descriptions)])

    def lookup(self, layer: str | int, unit: int) -> Unit:
        """A unit's exemplars, masks and descriptions; ``lookup(…).grid()`` is a picture of them.

        Raises:
            MilanError: There is no such layer or unit, or it responds to nothing.
        """
        layer = str(layer)
        exemplars = self._layer(layer)
        if not 0 <= unit < len(exemplars.ids) or exemplars.ids[unit, 0] < 0:
            raise MilanError(f"{self.model} has no exemplars of unit {unit} in layer {layer!r}: dead, or no such unit.")
        ids = exemplars.ids[unit][exemplars.ids[unit] >= 0]
        regions = packed_masks.unpack([exemplars.masks[unit, rank] for rank in range(len(ids))], self._view.shape)
        return Unit(
            layer,
            unit,
            self._views(ids).transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255),
            regions[:, None].astype(np.float32),
            model=self.model,
            image_ids=ids,
            activations=exemplars.activations[unit][: len(ids)],
            descriptions=self.descriptions.filter(layer=layer, unit=unit),
        )

    def describe(
        self, milan: Milan, layers: Sequence[str] | None = None, units: Sequence[int] | None = None, **options: Any
    ) -> pl.DataFrame:
        """Describes units; every image is encoded once for all units of a layer.

        Args:
            milan: A captioner, as :func:`milan_ray.load` gives it.
            layers: Which layers; None for all.
            units: Which units of each; None for all that respond to an image.
            **options: ``n_best``, ``lam``, ``beam_size`` of :meth:`milan_ray.Milan.describe`.

        Returns:
            One row per unit, columns as in the table of descriptions. They are kept, for :meth:`lookup`.

        Raises:
            MilanError: There is no such layer or unit.
        """
        chosen = self.layers if layers is None else list(layers)
        for layer in chosen:
            exemplars = self._layer(layer)
            alive = np.flatnonzero(exemplars.ids[:, 0] >= 0)
            wanted = alive if units is None else np.unique(np.asarray(units, int))
            if dead := sorted(set(wanted.tolist()) - set(alive.tolist())):
                raise MilanError(
                    f"{self.model} has no exemplars of units {dead[:8]} in layer {layer!r}: dead, or no such units."
                )
            self._descriptions[layer] = self._describe(milan, layer, wanted, options)
        return self.descriptions.filter(pl.col("layer").is_in(chosen))

    def _describe(self, milan: Milan, layer: str, units: np.ndarray, options: Mapping[str, Any]) -> pl.DataFrame:
        frames = [as_frame(DESCRIPTIONS.schema.empty_table())]
        counts = (self._exemplars[layer].ids[units] >= 0).sum(axis=1)
        features = self._encode(milan.encoder, layer, units)
        queries = None if milan.judge is None else self._encode(milan.judge, layer, units)
        for count in np.unique(counts).tolist():  # with few images, units may have fewer exemplars
            rows = np.flatnonzero(counts == count)
            own_queries = None if queries is None else queries[rows, :count]
            frame = milan.describe_encoded(features[rows, :count], own_queries, **options)
            labeler = MILAN if milan.clip is None else milan.clip.labeler().name
            keys = {"labeler": pl.lit(labeler), "model": pl.lit(self.model), "layer": pl.lit(layer)}
            frame = frame.with_columns(pl.Series("unit", units[rows].astype(np.int32)), **keys)
            frames.append(frame.select(frames[0].columns).cast(frames[0].schema))
        return pl.concat(frames).sort("unit")

    def _encode(self, encoder: Encoder, layer: str, units: np.ndarray) -> np.ndarray:
        """Features (units, k, F), 0 where a unit has fewer exemplars."""
        exemplars = self._exemplars[layer]
        ids = exemplars.ids[units]
        k, flat = ids.shape[1], ids.ravel()
        distinct = np.unique(flat[flat >= 0])

        def masks_at(places: np.ndarray) -> torch.Tensor:
            packed = [exemplars.masks[int(units[place // k]), int(place % k)] for place in places]
            return torch.from_numpy(packed_masks.unpack(packed, self._view.shape))

        def load(start: int, stop: int) -> torch.Tensor:
            images = torch.from_numpy(self._views(distinct[start:stop])).to(encoder.mean.device)
            return encoder.fit(images.permute(0, 3, 1, 2).float() * (1 / 255))

        wanted = MaskedExemplars(np.where(flat < 0, -1, np.searchsorted(distinct, flat)), masks_at)
        features = encode_images(encoder, wanted, load, len(distinct), f"encoding {layer}")
        return features.reshape(*ids.shape, -1)

    def _views(self, ids: np.ndarray) -> np.ndarray:
        """Images as the model saw them, uint8 (n, H, W, 3), in this order."""
        batch = read_views(self._probe, [self._refs[image] for image in ids.tolist()], self._view)
        return batch.complete("was read before but not now ({reason}); dissect again.").views

    def _layer(self, layer: str) -> _Layer:
        if layer not in self._exemplars:
            raise unknown_name("layer", layer, self._exemplars, "These were dissected.")
        return self._exemplars[layer]


def dissect(
    model: nn.Module | str,
    images: ProbeImages | Probe,
    layers: Sequence[str] | None = None,
    *,
    k: int = 15,
    quantile: float = 0.99,
    preprocess: Preprocess | None = None,
    activations: Activations = "seen",
    batch_size: int = 128,
    arithmetic: Arithmetic = FLOAT32,
    weights: str | None = None,
    device: str = "auto",
    batch_axis: int | None = None,
    units_axis: int | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    channels_last: bool | None = None,
    name: str | None = None,
    plugins: Sequence[str] = (),
    image_column: str | None = None,
    features: Mapping[str, Features] | None = None,
) -> Dissection:
    """Finds the exemplars of all units of a model's layers (paper §3): one pass over the images, in this process.

    Args:
        model: A network, on the device it is to run on; or a registered name (``resnet18/imagenet``).
        images: See :data:`milan_ray.library.probe_images.ProbeImages`.
        layers: Module paths; of a registered model None takes its own.
        k: Exemplars per unit.
        quantile: Activation quantile of the level η, above which a position belongs to a mask.
        preprocess: View and normalisation of the model's inputs; None takes ImageNet's, or the registered model's.
        activations: Which values of a layer count; see :class:`milan_ray.models.hooks.LayerTap`.
        batch_size: Images per forward pass; CPUs take at most 16.
        arithmetic: Precision and memory format that the network computes in; an ``autocast`` around the call is not
            heeded. The network itself stays as it is.
        weights: Of a registered model: a file, the name of published ones, or ``random``.
        device: Where a registered model runs.
        batch_axis: Axis of the layers' outputs that counts images, where it cannot be found out (docs/layouts.md).
        units_axis: Axis that counts units; negative ones count from the end.
        grid: (height, width) of the layers' positions.
        prefix_tokens: Tokens before the positions (CLS, registers), which are left out.
        channels_last: Whether 4-d outputs are (B, H, W, U): short for ``units_axis=-1``.
        name: What to call the model; of a registered one its own.
        plugins: Modules or ``.py`` files that register the model or the probe.
        image_column: Of Parquet, Arrow and tar files, where images are; None finds it.
        features: Feature sets to dissect like layers, by names ``LAYER#NAME``: a matrix of directions (F, C), a
            :class:`~milan_ray.models.features.dictionary.Dictionary`, or the path of a checkpoint (docs/features.md).

    Raises:
        MilanError: There is no such model, layer or folder, a layer has no units, no image can be read, or features do
            not fit their layer.
    """
    _check_numbers(k, quantile, batch_size)
    if activations not in get_args(Activations):
        raise unknown_name("activations", str(activations), get_args(Activations), "Give one of these.")
    load_plugins(plugins)
    reading = Reading(batch_axis, _units_axis(units_axis, channels_last), grid, prefix_tokens)
    sets = {path: feature_set(path, given) for path, given in (features or {}).items()}
    if isinstance(model, nn.Module):
        if weights is not None:
            raise MilanError("weights= is for registered models: load them into the network, and leave it out.")
        network = unwrap(model)
        _check_device(network, device)
        spec = _spec(network, [*(layers or ()), *sets], preprocess, activations, name, reading)
    else:
        spec = resolve_model(model, weights, layers, activations=activations, reading=reading)
        if sets:
            spec = replace(spec, layers=tuple(dict.fromkeys([*(spec.layers if layers else ()), *sets])))
        spec = replace(spec, preprocess=preprocess or spec.preprocess, name=name or spec.name)
        network = spec.load().to(resolve_device(device))
    spec = replace(spec, features={**spec.features, **sets})
    probe = image_probe(images, image_column)
    check_probe(spec, probe)
    check_axes(images, spec)
    if spec.images is not None:
        raise MilanError(f"{spec.name} is a generator: dissect it with jobs.exemplars.")
    refs = image_refs(probe.manifest())
    plan = StateConfig(len(refs), k, quantile, max(len(refs), 2**20), _ALL_MAPS)
    with _evaluating(network):
        size = pass_size(spec.batch(batch_size), _device_of(network))
        forward, layouts = _forward(network, spec, size, arithmetic)
        rectified = [layer for layer, layout in layouts.items() if layout.rectified]
        found = LayerStates(plan, torch.get_num_threads(), rectified)
        states, skipped = _run(forward, spec, probe, refs, size, found)
    exemplars = {layer: _settle(state, spec.preprocess.view.shape) for layer, state in states.items()}
    for layer, of_layer in exemplars.items():
        positions = states[layer].level.counted.cpu().numpy()
        if words := find_ties(of_layer.activations, of_layer.levels, positions, quantile).in_words():
            say(f"layer {layer!r} of {spec.name} {words}", level="warning")
    return Dissection(spec.name, probe, refs, spec.preprocess, exemplars, skipped)


def _units_axis(units_axis: int | None, channels_last: bool | None) -> int | None:
    """The axis of units, of which ``channels_last`` is a short form."""
    if channels_last is None:
        return units_axis
    if units_axis not in (None, -1 if channels_last else 1):
        raise MilanError(f"channels_last={channels_last} and units_axis={units_axis} say different things: give one.")
    return -1 if channels_last else 1


def _spec(
    model: nn.Module,
    layers: Sequence[str] | None,
    preprocess: Preprocess | None,
    activations: Activations,
    name: str | None,
    reading: Reading,
) -> ModelSpec:
    if not layers:
        paths = [path for path, _ in model.named_children()] or list(named_layers(model))
        raise MilanError(
            f"which layers: give layers=[…], module paths such as {', '.join(map(repr, paths[:8]))}; a layer's own "
            "parts are 'layer4.1.conv2', the network's output is 'outputs'."
        )
    return ModelSpec(
        name or type(model).__name__,
        lambda weights: model,
        tuple(dict.fromkeys(layers)),
        preprocess or Preprocess(),
        activations=activations,
        reading=reading,
    )


def _check_numbers(k: int, quantile: float, batch_size: int) -> None:
    for name, value in (("k", k), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise MilanError(f"{name}={value!r}: give a whole number of at least 1.")
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float, np.number)) or not 0 < quantile < 1:
        raise MilanError(f"quantile={quantile!r}: give a number between 0 and 1, such as 0.99.")


def _device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _check_device(network: nn.Module, device: str) -> None:
    """A network runs where it is: another device would do nothing."""
    if device == "auto":
        return
    wanted, here = resolve_device(device), _device_of(network)
    if wanted.type != here.type or (wanted.index or 0) != (here.index or 0):
        raise MilanError(
            f"device={device!r} is for registered models: this network is on {here}; call .to({device!r})."
        )


def _forward(
    network: nn.Module, spec: ModelSpec, size: int, arithmetic: Arithmetic
) -> tuple[Forward, dict[str, Layout]]:
    """Checks the network and establishes its layers' layouts."""
    bases = list(dict.fromkeys(map(spec.base, spec.layers)))
    find_layers(network, bases)
    check_network(spec.name, network)
    found = establish(spec, network, bases)
    layouts = with_features(spec, {layer: found[spec.base(layer)] for layer in spec.layers})
    for layer, layout in layouts.items():
        if layout.remark:
            say(f"layer {layer!r} of {spec.name} {layout.remark}", level="warning")
    # A copy for channels last, because weights are changed in place.
    runs = deepcopy(network) if arithmetic.channels_last else network
    return Forward(spec, runs, spec.layers, size, arithmetic, layouts), layouts


def _run(
    forward: Forward, spec: ModelSpec, probe: ImageProbe, refs: Sequence[ImageRef], size: int, layers: LayerStates
) -> tuple[dict[str, LayerState], list[tuple[ImageRef, str]]]:
    """One pass over the images, with warnings: layer → its state, and what could not be read."""
    skipped: list[tuple[ImageRef, str]] = []
    doubts: list[tuple[str, str]] = []
    with Progress(f"exemplars of {spec.name}", len(refs), "images") as progress:
        for part, batch in read_ahead(probe, refs, spec, size, torch.get_num_threads()):
            skipped += batch.unreadable
            doubts += [(ref.location, why) for ref, why in batch.notes]
            for rows, maps in forward.sparse_pieces(batch.inputs) if len(batch.ids) else ():
                layers.update(maps, batch.ids[rows])
            progress.advance(len(part))
    if not layers.states:
        first = f", the first {skipped[0][0].location}: {skipped[0][1]}" if skipped else ""
        raise MilanError(f"none of {len(refs)} images can be read{first}; give images that PIL can open.")
    tell_doubts(doubts, len(doubts))
    if skipped:
        say(f"skipped {len(skipped)} of {len(refs)} images: see .skipped")
    for layer, state in layers.states.items():
        if words := in_words(state.level.nonfinite):
            say(f"layer {layer!r} of {spec.name} {words}", level="warning")
    return layers.states, skipped


def _settle(state: LayerState, size: tuple[int, int]) -> _Layer:
    topk, levels = state.topk, state.level.result()
    ids = topk.ids.cpu()
    unit, rank = torch.nonzero(ids >= 0, as_tuple=True)

    def maps_of(part: torch.Tensor) -> torch.Tensor:
        return topk.maps_of(unit[part].to(topk.ids.device), rank[part].to(topk.ids.device)).cpu()

    packed = packed_masks.packed_masks(maps_of, levels[unit], size)
    masks = dict(zip(zip(unit.tolist(), rank.tolist(), strict=True), packed, strict=True))
    return _Layer(ids.numpy(), topk.values.cpu().numpy(), levels.numpy(), masks)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module has its own mode back afterwards."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
