"""Runs a model over a probe: reads inputs, pads batches, and records all layers in one forward pass."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from milan_ray.config import FLOAT32, Arithmetic
from milan_ray.device import to_device
from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.exemplars.feature_maps import PIECE_BYTES, FeatureMaps
from milan_ray.exemplars.sparse_maps import SparseMaps
from milan_ray.models.batch_mates import differing, exchanged, summary
from milan_ray.models.establish import established
from milan_ray.models.hooks import LayerTap, call, unwrap
from milan_ray.models.inputs import computes_in, prepare, runs_alone
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelInput, ModelSpec
from milan_ray.models.view import View
from milan_ray.probe.base import ImageProbe, ImageRef, LatentProbe, Probe, ProbeImage

Inputs = np.ndarray | tuple[torch.Tensor, ...]
"""Views uint8 (n, H, W, bands), or a generator's latents, each (n, …)."""


@dataclass
class Batch:
    """Probe rows as inputs of a model.

    Attributes:
        inputs: The model's n views or latents.
        ids: int64 (n,), the image ids.
        sha256: The n images' digests.
        unreadable: (row, reason) of images that could not be read.
        notes: (row, warning) of images that may be decoded wrongly.
    """

    inputs: Inputs
    ids: np.ndarray
    sha256: list[str]
    unreadable: list[tuple[ImageRef, str]] = field(default_factory=list)
    notes: list[tuple[ImageRef, str]] = field(default_factory=list)

    @property
    def views(self) -> np.ndarray:
        """The inputs of a model that takes images, uint8 (n, H, W, bands)."""
        assert isinstance(self.inputs, np.ndarray)
        return self.inputs

    def complete(self, message: str) -> Batch:
        """Returns the batch, and raises if an image could not be read.

        Args:
            message: The error's text after the image's location; ``{reason}`` is replaced by the reason.

        Raises:
            MilanError: An image could not be read.
        """
        for ref, reason in self.unreadable:
            raise MilanError(f"{ref.location} {message.format(reason=reason)}")
        return self


def check_probe(spec: ModelSpec, probe: Probe) -> None:
    """Checks that a generator gets latents and that any other model gets images.

    Raises:
        MilanError: The probe does not fit the model.
    """
    if spec.images is not None and not isinstance(probe, LatentProbe):
        raise MilanError(
            f"{spec.name} generates images from tensors, but probe {probe.name!r} holds images: give a folder of its "
            "latents (.pth, .npy, .npz or .safetensors)."
        )
    if spec.images is None and isinstance(probe, LatentProbe):
        raise MilanError(
            f"{spec.name} takes images, but probe {probe.name!r} holds latents for a generator: give images, or "
            "register the model with images=, which makes it a generator."
        )


def read_inputs(probe: Probe, refs: Sequence[ImageRef], spec: ModelSpec) -> Batch:
    """Reads probe rows as a model's inputs; collects unreadable rows with their reasons.

    Raises:
        MilanError: An image has bands that the model would ignore.
    """
    if not isinstance(probe, LatentProbe):
        return _read(probe, refs, spec.view_shape, partial(_seen_by, spec))
    latents = probe.latents(refs)
    digests = []
    for row in zip(*latents, strict=True):
        digest = hashlib.sha256()
        for tensor in row:
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        digests.append(digest.hexdigest())
    return Batch(latents, np.array([ref.image_id for ref in refs], np.int64), digests)


def read_views(probe: ImageProbe, refs: Sequence[ImageRef], view: View) -> Batch:
    """Reads images in RGB, as they are shown to people, and applies a view; collects unreadable images with reasons."""
    return _read(probe, refs, (*view.shape, 3), lambda _, found: view(found.image))


def _seen_by(spec: ModelSpec, ref: ImageRef, found: ProbeImage) -> np.ndarray:
    """Converts an image to a model's input, uint8 of its ``view_shape``.

    Raises:
        UnreadableImage: The image has another number of bands than the model takes.
        MilanError: The image has bands that the model would ignore, and its registration does not allow dropping them.
    """
    view, planes = spec.preprocess.view, found.planes
    is_picture = not isinstance(found.bands, np.ndarray)  # a PIL image: extra bands are alpha, or it is CMYK
    if spec.bands is None:
        if len(planes) in (1, 3) or (spec.inputs is None and is_picture):
            return view(found.image)
        if spec.inputs is not None:
            remedy = f"register it with bands={len(planes)}, so that inputs= gets them all"
            remedy += ", or with bands=3, which drops alpha" if is_picture else ""
        else:
            remedy = f"register it with inputs= and bands={len(planes)}, or give the three bands to show"
        raise MilanError(f"{ref.location} has {len(planes)} bands, of which {spec.name} would see RGB alone: {remedy}.")
    if spec.bands == 3 and (is_picture or len(planes) == 1):
        return view(found.image)
    if spec.bands == 1 and is_picture and len(planes) == 2:
        planes = planes[:1]
    if len(planes) != spec.bands:
        raise UnreadableImage(f"has {len(planes)} bands where {spec.name} takes {spec.bands}")
    return view.bands(planes)


def _read(
    probe: ImageProbe,
    refs: Sequence[ImageRef],
    shape: tuple[int, ...],
    see: Callable[[ImageRef, ProbeImage], np.ndarray],
) -> Batch:
    views = np.zeros((len(refs), *shape), np.uint8)
    batch = Batch(views, np.zeros(len(refs), np.int64), [])
    for ref in refs:
        good = len(batch.sha256)
        try:
            image = probe.read(ref)
            views[good] = see(ref, image)
        except UnreadableImage as error:
            batch.unreadable.append((ref, str(error)))
            continue
        if image.note is not None:
            batch.notes.append((ref, image.note))
        batch.ids[good] = ref.image_id
        batch.sha256.append(image.sha256)
    good = len(batch.sha256)
    batch.inputs, batch.ids = views[:good], batch.ids[:good]
    return batch


Batches = Iterator[tuple[Sequence[ImageRef], Batch]]
"""The rows of batches, and the batches."""

PIECE = 16
"""Images that a thread reads at a time: several threads work on one large batch."""


def read_ahead(probe: Probe, refs: Sequence[ImageRef], spec: ModelSpec, size: int, threads: int) -> Batches:
    """Yields rows in batches of one forward pass, and reads the next batches while the model runs.

    Args:
        probe: The probe to read from.
        refs: The rows.
        spec: The model that takes the batches.
        size: Rows per batch.
        threads: Number of threads that read; batches do not depend on it.
    """
    piece = min(size, PIECE)
    ahead = max(1, threads * piece // size)  # batches, so that every thread has a piece to read
    waiting: deque[tuple[Sequence[ImageRef], list[Future[Batch]]]] = deque()
    with ThreadPoolExecutor(threads) as readers:
        for start in range(0, len(refs), size):
            part = refs[start : start + size]
            pieces = (part[first : first + piece] for first in range(0, len(part), piece))
            waiting.append((part, [readers.submit(read_inputs, probe, rows, spec) for rows in pieces]))
            if len(waiting) > ahead:
                part, batches = waiting.popleft()
                yield part, _joined(batches)
        for part, batches in waiting:
            yield part, _joined(batches)


def _joined(reading: Sequence[Future[Batch]]) -> Batch:
    """One batch out of its pieces, in order."""
    pieces = [future.result() for future in reading]
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0].inputs, tuple):
        parts = zip(*(piece.inputs for piece in pieces), strict=True)
        inputs: Inputs = tuple(torch.cat([torch.as_tensor(tensor) for tensor in part]) for part in parts)
    else:
        inputs = np.concatenate([piece.views for piece in pieces])
    return Batch(
        inputs,
        np.concatenate([piece.ids for piece in pieces]),
        [digest for piece in pieces for digest in piece.sha256],
        [row for piece in pieces for row in piece.unreadable],
        [row for piece in pieces for row in piece.notes],
    )


MOST_SHARED = 2**30
"""Bytes of a shard's views up to which they are kept for the next model; a shard of more is read for each model."""


def reading(spec: ModelSpec) -> Hashable:
    """What decides how an image becomes a model's input: models of which it is equal take the same inputs."""
    if spec.images is not None:
        return "latents"
    if spec.bands is not None:  # what is said of images with other bands names the model
        return spec.name
    return spec.preprocess.view, spec.inputs is None


class SharedInputs:
    """The rows of a shard, read once for all models that take the same inputs.

    Args:
        probe: The probe to read from.
        refs: The rows.
        threads: Number of threads that read.
        models: Number of models that take them; for one, nothing is kept.
        read: Makes batches of a number of rows out of what another process has read; None reads here.
    """

    def __init__(
        self,
        probe: Probe,
        refs: Sequence[ImageRef],
        threads: int,
        models: int,
        read: Callable[[int], Batches] | None = None,
    ) -> None:
        self._probe, self._refs, self._threads, self._models, self._elsewhere = probe, refs, threads, models, read
        self._read: dict[Hashable, list[tuple[Sequence[ImageRef], Batch]]] = {}

    def batches(self, spec: ModelSpec, size: int) -> Batches:
        """Yields the rows in batches of one forward pass, as :func:`read_ahead` does.

        Args:
            spec: The model that takes the batches; it must not change them.
            size: Rows per batch.
        """
        if self._elsewhere is not None:
            yield from self._elsewhere(size)
            return
        key = reading(spec), size
        if key in self._read:
            yield from self._read[key]
            return
        kept = []
        keeps = self._models > 1 and len(self._refs) * prod(spec.view_shape) <= MOST_SHARED
        for batch in read_ahead(self._probe, self._refs, spec, size, self._threads):
            if keeps:
                kept.append(batch)
            yield batch
        if keeps:
            self._read[key] = kept


CPU_PASS = 16
"""Maximum number of images per forward pass on a CPU. Maps of larger batches do not fit into the CPU caches: a pass
over 128 images takes 15 % longer per image, and eight times the memory (BENCHMARKS.md)."""


def pass_size(batch_size: int, device: torch.device) -> int:
    """Images per forward pass: the requested ``batch_size``, limited to :data:`CPU_PASS` on a CPU."""
    return min(batch_size, CPU_PASS) if device.type == "cpu" else batch_size


_CHECKED: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()
"""Network → configurations for which :class:`Forward` has verified that images do not depend on each other."""


class Forward:
    """A model with forward hooks on its layers, run at one fixed batch size.

    The kernels of a convolution or matrix product may depend on the batch size, and with them the last bits of the
    result. A short batch is therefore padded to the full size, so that an image's maps do not depend on the other
    images in its batch. To verify this, the first batch is run again with half of its images exchanged, once per
    network and process.

    Args:
        spec: The model.
        model: The model, built, on its device.
        layers: Module paths to read.
        batch_size: Images per forward pass.
        arithmetic: How the model computes.
        layouts: Layer → how its output is read; None determines it with the first batch.

    Raises:
        MilanError: A layer does not exist.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        layers: Sequence[str],
        batch_size: int,
        arithmetic: Arithmetic = FLOAT32,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        model = unwrap(model)
        self._spec, self._layers = spec, tuple(layers)
        self._layouts = None if layouts is None else {spec.base(layer): layout for layer, layout in layouts.items()}
        self._alone = runs_alone(model)
        self._batch_size = 1 if self._alone else batch_size
        self._model = model.to(memory_format=torch.channels_last) if arithmetic.channels_last else model
        self._low = None if arithmetic.precision == "float32" else getattr(torch, arithmetic.precision)
        parameter = next(iter(model.parameters()), None)
        self._device = parameter.device if parameter is not None else torch.device("cpu")
        self._bases = tuple(dict.fromkeys(map(spec.base, layers)))
        self._encoders = {
            layer: FeatureMaps(spec.features[layer], self._device) for layer in layers if layer in spec.features
        }

    def maps(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Computes every layer's activation maps of one batch of inputs, at once; see :meth:`pieces`.

        Args:
            inputs: n ≤ batch size views, or a generator's latents.

        Returns:
            Layer → (n, U, h, w), on the model's device, float32 at any precision.

        Raises:
            MilanError: As for :meth:`pieces`.
        """
        found: dict[str, list[torch.Tensor]] = {layer: [] for layer in self._layers}
        for _, maps in self.pieces(inputs):
            for layer, piece in maps.items():
                found[layer].append(piece)
        return {layer: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for layer, pieces in found.items()}

    def pieces(self, inputs: Inputs) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """Computes every layer's activation maps of one batch of inputs; of many features, for some images at a time.

        A layer of 25,000 features has maps of 300 MB for sixteen images; its units have maps of 10 MB.

        Args:
            inputs: n ≤ batch size views, or a generator's latents.

        Yields:
            Rows of the inputs, and layer → (rows, U, h, w), on the model's device, float32 at any precision. Each layer
            comes with all rows, in order.

        Raises:
            MilanError: A layer's output cannot be read as maps, an image's maps depend on other images, or features
                cannot be read from a layer.
        """
        for rows, maps in self.sparse_pieces(inputs):
            dense = {layer: found for layer, found in maps.items() if isinstance(found, torch.Tensor)}
            if dense or not maps:
                yield rows, dense
            for layer, found in maps.items():
                if isinstance(found, SparseMaps):
                    for part, piece in found.dense_parts(PIECE_BYTES):
                        yield slice(rows.start + part.start, rows.start + part.stop), {layer: piece}

    @torch.inference_mode()
    def sparse_pieces(self, inputs: Inputs) -> Iterator[tuple[slice, dict[str, torch.Tensor | SparseMaps]]]:
        """As :meth:`pieces`, but features of which few are on at a position stay sparse."""
        maps = self._base_maps(inputs)
        count = len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)
        yield slice(0, count), {layer: found for layer, found in maps.items() if layer in self._layers}
        for layer, encoder in self._encoders.items():
            for rows, found in encoder.pieces(maps[self._spec.base(layer)], self._batch_size):
                yield rows, {layer: found}

    def _base_maps(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Maps (n, U, h, w) of the layers, and of those that feature sets read."""
        if self._layouts is None:
            latents = inputs if isinstance(inputs, tuple) else None
            self._layouts = established(self._spec, self._model, self._bases, latents)
        checked = _CHECKED.setdefault(self._model, set())
        how = self._spec.activations, self._bases, self._batch_size, self._low
        if self._batch_size > 1 and self._bases and how not in checked:
            maps = self._checked(inputs, self._layouts)
            checked.add(how)
            return maps
        parts = [self._maps(part, self._layouts) for part in self._parts(inputs)]
        return (
            parts[0] if len(parts) == 1 else {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
        )

    def _maps(self, inputs: Inputs, layouts: Mapping[str, Layout], every: bool = False) -> dict[str, torch.Tensor]:
        """The maps of the inputs; with ``every``, also those of the padding rows of the batch."""
        count, prepared = self._prepare(inputs)
        with LayerTap(self._model, self._bases, self._spec.hidden, self._spec.activations) as tap, self._mixed():
            outputs = tap(prepared)
        if self._batch_size > 1:
            for layer, layout in layouts.items():
                if layout.calls and tap.calls.get(layer, layout.calls) != layout.calls:
                    raise MilanError(
                        f"layer {layer!r} of {self._spec.name} runs {tap.calls[layer]} times for a batch of "
                        f"{self._batch_size} images, and ran {layout.calls} times for others: its last call depends "
                        f"on what lies beside an image; choose one of its calls, as {layer + '@1'!r}, or a layer "
                        "around it."
                    )
        rows = self._batch_size if every else count
        maps = {
            layer: layouts[layer].maps(output, f"layer {layer!r} of {self._spec.name}", self._batch_size)[:rows]
            for layer, output in outputs.items()
        }
        return {layer: found.float() for layer, found in maps.items()}

    def _checked(self, inputs: Inputs, layouts: Mapping[str, Layout]) -> dict[str, torch.Tensor]:
        """The maps of a batch; verifies that they do not depend on the other images in the batch.

        Raises:
            MilanError: An image's maps depend on other images.
        """
        exchange = exchanged(inputs, self._batch_size)
        # Runs first and keeps only a summary, so that the maps of only one pass are in memory.
        other = {layer: summary(maps) for layer, maps in self._maps(exchange.inputs, layouts).items()}
        every = self._maps(inputs, layouts, every=True)
        dtype = computes_in(self._model)
        if self._low is not None and torch.finfo(self._low).eps > torch.finfo(dtype).eps:
            dtype = self._low
        for layer, maps in every.items():
            if differing(summary(maps), other[layer], exchange, dtype, self._device):
                raise MilanError(
                    f"layer {layer!r} of {self._spec.name} puts out other values for an image beside other images, in "
                    f"batches of {self._batch_size}, so that results would depend on the batches: register the model "
                    "with max_batch=1 so that images run alone, give it fixed statistics, or choose an earlier layer."
                )
        count = len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)
        return {layer: maps[:count] for layer, maps in every.items()}

    def _parts(self, inputs: Inputs) -> Iterator[Inputs]:
        """Splits the inputs into forward passes: all at once, or one by one if images must run alone."""
        if not self._alone:
            yield inputs
            return
        for row in range(len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)):
            yield tuple(t[row : row + 1] for t in inputs) if isinstance(inputs, tuple) else inputs[row : row + 1]

    @torch.inference_mode()
    def images(self, latents: Inputs, truncate: bool = False) -> np.ndarray:
        """Generates the images of one batch of latents, resized to the view's size by nearest neighbour.

        Args:
            latents: The generator's inputs, n ≤ batch size.
            truncate: The reference's quirk; see :meth:`milan_ray.models.view.Preprocess.pixels`.

        Returns:
            uint8 (n, H, W, 3).

        Raises:
            MilanError: The generator's output is not a batch of images.
        """
        spec = self._spec
        assert spec.images is not None
        count, prepared = self._prepare(latents)
        with self._mixed():
            images = spec.images(call(self._model, prepared)).float()
        if images.ndim != 4 or images.shape[:2] != (self._batch_size, 3):
            raise MilanError(
                f"{spec.name} puts out images of shape {tuple(images.shape)}, not (B, 3, H, W): register it with "
                "images=, a function that takes them out of its output."
            )
        pixels = spec.preprocess.pixels(images[:count], truncate).cpu().permute(0, 3, 1, 2)
        return F.interpolate(pixels, size=spec.preprocess.view.shape, mode="nearest").permute(0, 2, 3, 1).numpy()

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._low, enabled=self._low is not None)

    def _prepare(self, inputs: Inputs) -> tuple[int, ModelInput]:
        """Pads the inputs to a full batch on the device; returns their number and the model's input."""
        tensors = inputs if isinstance(inputs, tuple) else (torch.from_numpy(inputs),)
        count = len(tensors[0])
        if count < self._batch_size:
            short = self._batch_size - count
            tensors = tuple(torch.cat([tensor, tensor.new_zeros((short, *tensor.shape[1:]))]) for tensor in tensors)
        return count, prepare(self._spec, self._model, *(to_device(tensor, self._device) for tensor in tensors))
