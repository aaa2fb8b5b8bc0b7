"""Describe exemplars at hand: images and masks of units, from wherever they come."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from PIL import Image

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.encoder import Encoder, MaskedExemplars, PyramidEncoder, encode_exemplars, get_encoder
from milan_ray.captioner.quirks import NO_QUIRKS, REFERENCE, Quirks
from milan_ray.captioner.text import readable
from milan_ray.device import resolve_device
from milan_ray.errors import MilanError
from milan_ray.labelers.clip import Clip, query, similarity
from milan_ray.labelers.milan import best_labels
from milan_ray.library.run_directory import as_frame
from milan_ray.models.image_text import DEFAULT, ImageText, find_image_text
from milan_ray.plugins import load_plugins
from milan_ray.progress import Progress
from milan_ray.schema import DESCRIPTIONS
from milan_ray.stages.captioners import RERANKED, load_captioner
from milan_ray.storage import Storage

BATCH_SIZE = 32
"""Images per encoder pass."""

UNITS_PER_SEARCH = 16
"""Units per beam search, as in the reference: with its quirks on, a score depends on the batch."""

Images = np.ndarray | torch.Tensor | Sequence[Any]
"""Exemplar images of U units, k each: an array or tensor (U, k, 3, H, W) or (U, k, H, W, 3), RGB, uint8 or floats in
[0, 1], a memory-mapped one too; or nested lists of such arrays or of PIL images."""

Masks = np.ndarray | torch.Tensor | Sequence[Any]
"""Their masks: (U, k, 1, H, W), (U, k, H, W) or (U, k, H, W, 1), boolean or numbers in [0, 1]; or nested lists."""


@dataclass(frozen=True, eq=False)
class Milan:
    """A captioner with its image encoder, ready to describe.

    Attributes:
        captioner: Vocabulary, decoder and language model.
        encoder: The image encoder, on the same device.
        quirks: Defects of the reference to reproduce.
        clip: How candidates are re-ranked; None for log p(d|E) − λ·log p(d).
        judge: The model of images and texts that re-ranks, on the same device.
    """

    captioner: Captioner
    encoder: PyramidEncoder
    quirks: Quirks = NO_QUIRKS
    clip: Clip | None = None
    judge: ImageText | None = None

    def describe(
        self,
        images: Images,
        masks: Masks | None = None,
        *,
        n_best: int = 5,
        lam: float | None = None,
        beam_size: int | None = None,
        resize: bool = False,
    ) -> pl.DataFrame:
        """Describes units by their exemplars (paper §3).

        Args:
            images: The exemplars, see :data:`Images`.
            masks: Where in them the unit is active, see :data:`Masks`; None takes the whole images.
            n_best: How many descriptions to list per unit.
            lam: λ of log p(d|E) − λ·log p(d); the captioner's own when left out. With CLIP it is what candidates are
                searched with.
            beam_size: Width of the beam; the captioner's own when left out, or CLIP's.
            resize: Bring images of another size to the encoder's own, as the jobs do; off, they are encoded at the
                size they have, as in the reference.

        Returns:
            One row per unit, in order: unit (its place), description, score, logp_d_given_e, logp_d, lam, n_best
            (the best first, no two alike), as in the table of descriptions.

        Raises:
            MilanError: Shapes, types or values cannot be used; the sentence says which.
        """
        _check_best(n_best)
        features = self.encode(images, masks, resize=resize)
        queries = None if self.judge is None else self._encode(self.judge, images, masks, resize=True)
        return self.describe_encoded(features, queries, n_best=n_best, lam=lam, beam_size=beam_size)

    def describe_encoded(
        self,
        features: np.ndarray,
        queries: np.ndarray | None = None,
        *,
        n_best: int = 5,
        lam: float | None = None,
        beam_size: int | None = None,
    ) -> pl.DataFrame:
        """Describes units by what :meth:`encode` made of their exemplars.

        Args:
            features: float32 (U, k, F).
            queries: With CLIP, the same by :attr:`judge`.
            n_best: See :meth:`describe`.
            lam: See :meth:`describe`.
            beam_size: See :meth:`describe`.

        Returns:
            See :meth:`describe`.

        Raises:
            MilanError: The features are not this encoder's.
        """
        _check_best(n_best)
        quirks, mi_lam, similarities = self.quirks, None, None
        if self.clip is None:
            lam = (0.0 if self.captioner.lm is None else self.captioner.lam) if lam is None else lam
        else:
            assert queries is not None
            similarities = self._similarities(queries)
            mi_lam = self.clip.mi_lam(self.captioner) if lam is None else lam
            beam_size = self.clip.beams(self.captioner) if beam_size is None else beam_size
            # No other quirk touches this search, and no λ what it ranks by.
            quirks, lam = Quirks(plain_choice=quirks.plain_choice), None
        size = UNITS_PER_SEARCH if self.clip is None else 1
        rows: list[dict[str, object]] = []
        with Progress("describing", len(features), "units") as progress:
            for start in range(0, len(features), size):
                batch = features[start : start + size]
                candidates = self.captioner.candidates(batch, beam_size, mi_lam=mi_lam, quirks=quirks)
                likely = candidates.likelihood(mi_lam)
                for place, texts in enumerate(candidates.texts):
                    scores = similarities(len(rows), texts) if similarities else candidates.scores(lam or 0.0)[place]
                    prior = None if candidates.logp_d is None else candidates.logp_d[place]
                    finished = None if quirks.plain_choice else candidates.finished[place]
                    best = best_labels(texts, scores, likely[place], prior, n_best, finished)
                    row = {"unit": len(rows), "description": best[0].text, "lam": lam, "n_best": list(map(vars, best))}
                    rows.append(vars(best[0]) | row)
                progress.advance(len(batch))
        names = ("unit", "description", "score", "logp_d_given_e", "logp_d", "lam", "n_best")
        schema = pa.schema([DESCRIPTIONS.schema.field(name) for name in names])
        return as_frame(pa.Table.from_pylist(rows, schema=schema))

    def encode(self, images: Images, masks: Masks | None = None, *, resize: bool = False) -> np.ndarray:
        """What the captioner sees of exemplars; equal images are encoded once.

        Args:
            images: See :data:`Images`.
            masks: See :data:`Masks`; None takes the whole images.
            resize: See :meth:`describe`.

        Returns:
            float32 (U, k, F).

        Raises:
            MilanError: Shapes, types or values cannot be used.
        """
        return self._encode(self.encoder, images, masks, resize)

    def _similarities(self, features: np.ndarray) -> Callable[[int, list[str]], np.ndarray]:
        """(unit, texts) → how well each fits the unit's exemplars; every distinct text is embedded once."""
        judge, clip = self.judge, self.clip
        assert judge is not None and clip is not None
        queries = [query(unit, clip.z) for unit in features]
        write = str if self.quirks.plain_choice else readable
        embedded: dict[str, np.ndarray] = {}

        def similarities(unit: int, texts: list[str]) -> np.ndarray:
            new = sorted(set(texts) - embedded.keys())
            vectors = judge.embed_texts([write(text) for text in new]).cpu().numpy()
            embedded.update(zip(new, vectors, strict=True))
            return similarity(np.stack([embedded[text] for text in texts]), np.stack([queries[unit]] * len(texts)))

        return similarities

    def _encode(self, encoder: Encoder, images: Images, masks: Masks | None, resize: bool) -> np.ndarray:
        pixels = _images(images)
        regions = None if masks is None else _masks(masks, pixels.shape)
        units, k, _, height, width = pixels.shape
        slots: dict[bytes, int] = {}  # digest of an image → its number among the different ones
        index = np.array([slots.setdefault(_digest(image), len(slots)) for unit in pixels for image in unit], int)
        first = np.unique(index, return_index=True)[1]

        def masks_at(places: np.ndarray) -> torch.Tensor:
            if regions is None:
                return torch.ones(len(places), height, width)
            return torch.from_numpy(np.stack([regions[divmod(n, k)] for n in places]))

        def load(start: int, stop: int) -> torch.Tensor:
            inputs = _inputs(np.stack([pixels[divmod(n, k)] for n in first[start:stop]]), encoder.mean.device)
            return encoder.fit(inputs) if resize else inputs

        features = encode_images(encoder, MaskedExemplars(index, masks_at), load, len(first), "encoding")
        return features.reshape(units, k, encoder.feature_size)


def encode_images(
    encoder: Encoder, exemplars: MaskedExemplars, load: Callable[[int, int], torch.Tensor], count: int, label: str
) -> np.ndarray:
    """Encodes exemplars, with a progress bar.

    Args:
        encoder: The image encoder.
        exemplars: Which images they are, by number, and their masks.
        load: (first, last + 1) → these images, (N, 3, H, W).
        count: Number of images.
        label: Name of the progress bar.

    Returns:
        float32 (exemplars, F).
    """
    with Progress(label, count, "images") as progress:

        def maps(start: int, stop: int) -> list[torch.Tensor]:
            progress.advance(stop - start)
            return encoder.maps(load(start, stop))

        return encode_exemplars(encoder, [exemplars], maps, count, BATCH_SIZE)[0]


def _check_best(n_best: int) -> None:
    if n_best < 1:
        raise MilanError(f"n_best is {n_best}: ask for at least one description per unit.")


def _inputs(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1]."""
    inputs = torch.from_numpy(pixels).to(device)
    inputs = inputs * (1 / 255) if pixels.dtype == np.uint8 else inputs.float()
    if not bool(((inputs >= 0) & (inputs <= 1)).all()):  # NaN is neither
        raise MilanError("images hold NaN or numbers outside [0, 1]: give floats in [0, 1], or uint8.")
    return inputs


def load(
    captioner: str | os.PathLike[str] = "base",
    storage: str | os.PathLike[str] | None = None,
    *,
    encoder_weights: str | None = None,
    clip: str | os.PathLike[str] | None = None,
    clip_z: float = 0.5,
    device: str = "auto",
    reference_quirks: bool = False,
    plugins: Sequence[str] = (),
) -> Milan:
    """Loads a captioner and its encoder.

    Args:
        captioner: A published one (``base``, ``cls``, …, looked for in ``$MILAN_MODELS_DIR``); the path of a
            ``milan-*.pth`` file or of a captioner's folder; or the name of one trained in ``storage``. With ``+clip``
            at its end, a wide beam is re-ranked by a model of images and texts (docs/clip.md).
        storage: Run directory that holds it.
        encoder_weights: File with the encoder's weights; None takes those that come with the captioner, else the
            encoder's published ones.
        clip: That model, CLIP or SigLIP: a folder, or the name of one in ``$MILAN_MODELS_DIR``; None takes CLIP
            ViT-B/32 where the captioner's name ends in ``+clip``, and re-ranks nothing otherwise.
        clip_z: Weight of whole images against their masked regions.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda:1`` …
        reference_quirks: Reproduce the reference's defects.
        plugins: Modules or ``.py`` files that register the encoder, where it is an own one.

    Raises:
        MilanError: There is no such captioner, or its encoder's weights are missing.
    """
    load_plugins(plugins)
    name = os.fspath(captioner)
    if name.endswith(RERANKED) and not os.path.exists(name):
        name, clip = name.removesuffix(RERANKED), clip or DEFAULT
    how = None if clip is None else Clip(find_image_text(os.fspath(clip)), clip_z)
    loaded = load_captioner(None if storage is None else Storage(storage), name)
    spec = replace(get_encoder(loaded.encoder_name), weights=encoder_weights)
    encoder = spec.load(loaded.encoder_state if encoder_weights is None else None)
    where = resolve_device(device)
    judge = None if how is None else how.load().to(where)
    quirks = REFERENCE if reference_quirks else NO_QUIRKS
    return Milan(loaded.to(str(where)), encoder.to(where), quirks, how, judge)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()


def _array(value: Any, what: str) -> np.ndarray:
    """Arrays, tensors, PIL images, and nested lists of them as one array; memory-mapped ones stay where they are."""
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("RGB") if what == "images" else value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()  # numpy knows no bfloat16
    if isinstance(value, (list, tuple)):
        parts = [_array(part, what) for part in value]
        if len(shapes := {part.shape for part in parts}) > 1:
            raise MilanError(f"{what} have different shapes ({sorted(shapes)}): give every unit as many, of one size.")
        return np.stack(parts) if parts else np.zeros(0)
    return np.asarray(value)


def _images(images: Images) -> np.ndarray:
    """The images as (U, k, 3, H, W), uint8 or float."""
    pixels = _array(images, "images")
    if pixels.ndim != 5 or 3 not in (pixels.shape[2], pixels.shape[4]) or 0 in pixels.shape[1:]:
        raise MilanError(
            f"images have shape {pixels.shape}: give (units, exemplars, 3, height, width) or (…, height, width, 3); "
            "images[None] makes a set of one unit."
        )
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise MilanError(f"images are of type {pixels.dtype}: give uint8, or floats in [0, 1].")
    return pixels if pixels.shape[2] == 3 else np.moveaxis(pixels, 4, 2)


def _masks(masks: Masks, shape: tuple[int, ...]) -> np.ndarray:
    """The masks (U, k, H, W) of images (U, k, 3, H, W), boolean or numbers in [0, 1]."""
    given = regions = _array(masks, "masks")
    units, k, _, height, width = shape
    for axis in (2, 4):
        if regions.ndim == 5 and regions.shape[axis] == 1:
            regions = regions.squeeze(axis)
    if regions.shape != (units, k, height, width):
        raise MilanError(
            f"masks have shape {given.shape} and images {shape}: give one mask of the image's size for each, "
            "(units, exemplars, 1, height, width)."
        )
    if regions.dtype != bool and not np.issubdtype(regions.dtype, np.number):
        raise MilanError(f"masks are of type {regions.dtype}: give booleans, or numbers in [0, 1].")
    empty = []
    for unit, of_unit in enumerate(regions):  # one at a time: the array may be memory-mapped
        if not bool(((of_unit >= 0) & (of_unit <= 1)).all()):
            raise MilanError(f"masks of unit row {unit} hold NaN or numbers outside [0, 1]: give booleans, or 0 and 1.")
        if not of_unit.any():
            empty.append(unit)
    if empty:
        raise MilanError(f"masks of unit rows {empty[:8]} are empty in all exemplars: leave these units out.")
    return regions
