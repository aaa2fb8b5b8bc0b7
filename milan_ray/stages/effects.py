"""Effects of units and features on the classes that a network tells (docs/effects.md).

probe ─► sample of images ─► [block of units × some images: change, rerun what comes after the layer, add up] ─► effects
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import ExemplarConfig, Fingerprint, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.stage import Job, Known, Output, Shard, ShardedStage, Shards, ShardWorker
from milan_ray.errors import MilanError
from milan_ray.exemplars.behaviour import COMPUTES, behaviours, same
from milan_ray.exemplars.forward import read_inputs
from milan_ray.models.ablation import directions
from milan_ray.models.establish import established
from milan_ray.models.hooks import unwrap
from milan_ray.models.interventions import Interventions
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import OUTPUTS, ModelSpec
from milan_ray.models.tail import Tail
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import say
from milan_ray.schema import EFFECTS
from milan_ray.scoring.effects import EffectSums, effects, peers
from milan_ray.scoring.layer_effects import LayerEffects, check_reaches
from milan_ray.scoring.simulation import scattered
from milan_ray.stages.exemplars import failing, store_manifest
from milan_ray.stages.exemplars.describe_model import AFTER_ACTIVATIONS, DescribedModel, describe_model
from milan_ray.stages.features_fit.passes import of_table, to_table
from milan_ray.storage import Storage, inputs_of

KERNEL_VERSION = "effects-1"

SAMPLE = "sample"
"""Name of the images' references in the work."""


@dataclass(frozen=True)
class EffectConfig:
    """How effects are measured.

    Attributes:
        images: Images of the probe at most: a fixed pseudo-random choice.
        factor: What an amplified unit is multiplied by.
        classes: Classes gained, and lost, that are stored for each unit.
    """

    images: int = 200
    factor: float = 2.0
    classes: int = 5

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise MilanError(f"--amplify {self.factor:g} does not amplify: give a number above 1.")


@dataclass(frozen=True)
class _Place:
    """Which model and layer an output is of.

    Attributes:
        model: Index of the model.
        layout: How the layer is read.
        weights: Digest of the model's weights.
    """

    model: int
    layout: Layout
    weights: str


class EffectsWorker(ShardWorker):
    """Changes a block of a layer's units on some images, and adds up what the changes do."""

    def __init__(
        self,
        models: Sequence[references.ModelRef],
        places: Mapping[int, _Place],
        probe: references.ProbeRef,
        factor: float,
        **context: Any,
    ) -> None:
        super().__init__(**context)
        self._models, self._places, self._factor = models, places, factor
        self._probe = references.probe(probe)
        self._sample = [ImageRef(**row) for row in self._storage.get_work(self._work, SAMPLE).to_pylist()]
        self._loaded = ModelCache(self._load)
        self._last: tuple[int, tuple[int, ...], LayerEffects] | None = None

    def _load(self, index: int) -> tuple[ModelSpec, torch.nn.Module]:
        spec = references.model(self._models[index])
        weights = next(place.weights for place in self._places.values() if place.model == index)
        # A copy, for a factory may give several threads one object, and a tail puts its own functions into modules.
        return spec, deepcopy(unwrap(references.network(spec, weights))).to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one block of units on some images."""
        (number,) = row["outputs"]
        spec, network = self._loaded(self._places[number].model)
        found = self._layer_effects(number, spec, network, tuple(row["units"]))
        refs = self._sample[row["start"] : row["start"] + row["images"]]
        batch = read_inputs(self._probe, refs, spec)
        sums: EffectSums | None = None
        what = f"layer {self._outputs[number].layer!r} of {spec.name}"
        for view, image_id in zip(torch.from_numpy(batch.views), batch.ids.tolist(), strict=True):
            try:
                sums = found.add(view, image_id, sums)
            except MilanError as error:
                raise MilanError(f"effects of {what}: {error}") from error
            except Exception as error:  # a user's model may raise anything
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise MilanError(f"effects of {what}: the model failed on image {image_id}: {reason}") from error
        arrays = {} if sums is None else sums.state()
        self._store(row, [(number, to_table({**arrays, "units": np.array(row["units"], np.int64)}))])
        return {"images": len(batch.ids)}

    def _layer_effects(
        self, number: int, spec: ModelSpec, network: torch.nn.Module, units: tuple[int, ...]
    ) -> LayerEffects:
        """The kernel for some units of a layer; the last one is kept, because its next shard mostly follows."""
        if self._last is None or self._last[:2] != (number, units):
            layer, layout = self._outputs[number].layer, self._places[number].layout
            vectors = directions(spec, layer) if layer in spec.features else None
            changes = Interventions(layer, units, layout.width, self._factor, vectors, self._device)
            tail = Tail(spec, network, spec.base(layer), layout)
            self._last = number, units, LayerEffects(tail, changes)
        return self._last[2]


class Effects(ShardedStage):
    """Effects of the units, or features, of classifiers' layers on their classes.

    Args:
        models: The classifiers, with their layers.
        probe: The images.
        config: How effects are measured.
        how: Which share of unreadable images is allowed.
        units: The units of every layer; empty for all.

    Attributes:
        units_per_shard: Units per shard: a shard's sums take 20 bytes for each unit, change and class.
        images_per_shard: Images per shard at least; never changes a result.
        most_ranges: Ranges of images at most, which bounds what is stored for the merge.
    """

    units_per_shard: ClassVar[int] = 512
    images_per_shard: ClassVar[int] = 32
    most_ranges: ClassVar[int] = 16
    worker = EffectsWorker
    table, counted = EFFECTS, "changed units × images"
    name = label = title = "effects"

    def __init__(
        self,
        models: Sequence[references.ModelRef],
        probe: references.ProbeRef,
        config: EffectConfig,
        how: ExemplarConfig,
        units: tuple[int, ...] = (),
    ) -> None:
        self._models, self._probe, self._config = tuple(dict.fromkeys(models)), probe, config
        self._how, self._units = how, units
        self._described: dict[str, DescribedModel] = {}
        self._tells: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def outputs(self, known: Known) -> Iterator[Output]:
        """The effects of every layer, by what its exemplars depend on but for the exemplars' own settings.

        Raises:
            MilanError: The probe cannot be listed.
        """
        source = references.probe(self._probe)
        digest = probe_digest(source.manifest())
        for ref in self._models:
            with failing(self.failed, ref.name):
                spec = references.model(ref)
                _check_classifier(spec, isinstance(source, LatentProbe))
                if ref.name not in self._described:
                    self._described[ref.name] = describe_model(spec, source, digest, self._how)
                    self._tells[ref.name] = _class_scores(spec)
                yield from list(self._outputs_of(known.storage, spec, self._described[ref.name]))

    def _outputs_of(self, storage: Storage, spec: ModelSpec, described: DescribedModel) -> Iterator[Output]:
        for layer, fingerprint in described.fingerprints.items():
            references.check_units(self._units, described.layouts[layer].units, spec.name, layer)
            alone = (*AFTER_ACTIVATIONS, "batch_size")  # each image runs alone
            inputs = {name: digest for name, digest in fingerprint.inputs.items() if name not in alone}
            own = {"effects": KERNEL_VERSION, "images": self._config.images, "amplify": self._config.factor}
            own |= {"classes": self._config.classes}
            if spec.classes is not None:
                own |= {"names": spec.classes}
            if layer in spec.features:
                own |= {"directions": hashlib.sha256(directions(spec, layer).numpy().tobytes()).hexdigest()}
            inputs |= Fingerprint.of(own).inputs
            inputs |= self._rewritten(storage, spec.name, layer)
            every = config_hash(inputs)
            if self._units:
                inputs |= Fingerprint.of({"units": self._units}).inputs
            yield Output(
                {"model": spec.name, "layer": layer}, Fingerprint(config_hash(inputs), inputs, every, self._units)
            )

    def _rewritten(self, storage: Storage, model: str, layer: str) -> dict[str, str]:
        """A further input where the network tells other classes than when its effects were measured.

        Neither weights nor modules say what a ``forward`` does behind the layer.
        """
        stored = storage.metadata(EFFECTS, model=model, layer=layer) or {}
        before, now = stored.get(COMPUTES), self._tells[model]
        if not before or not now:
            return {}
        further = inputs_of(stored).get(COMPUTES)
        if not same(before, now):
            say(f"effects of {model} {layer}: the network tells classes otherwise than then: measured anew")
            further = config_hash({COMPUTES: now})[:8]
        return {} if further is None else {COMPUTES: further}

    def shards(self, job: Job) -> Shards:
        """Blocks of units × ranges of images; an image's effects depend neither on its range nor on other images.

        Raises:
            MilanError: A network puts out no class scores, or they do not depend on a layer.
        """
        sample = chosen_images(store_manifest(job.storage, self._probe)[0], self._config.images)
        if not len(sample):
            raise MilanError("there are no images to measure effects on: give a probe with images.")
        job.storage.put_work(job.work, SAMPLE, sample)
        self._check(job.due)
        size = max(self.images_per_shard, -(-len(sample) // self.most_ranges))
        shards = []
        for output in job.due:
            units = list(self._units or range(self._layout(output).units))
            for first in range(0, len(units), self.units_per_shard):
                block = units[first : first + self.units_per_shard]
                for start in range(0, len(sample), size):
                    images = min(size, len(sample) - start)
                    row = {"units": block, "start": start, "images": images}
                    name = f"{output.number:04d}-{first:07d}-{start:09d}"
                    shards.append(Shard(name, (output.number,), row, images * len(block)))
        return Shards(shards, merged_in_driver=True)

    def _layout(self, output: Output) -> Layout:
        return self._described[output.model].layouts[output.layer]

    def _check(self, due: Sequence[Output]) -> None:
        """Tries every layer that is due on two pictures of noise."""
        for name in dict.fromkeys(output.model for output in due):
            spec = references.model(next(ref for ref in self._models if ref.name == name))
            network = unwrap(references.network(spec))
            noise = torch.Generator().manual_seed(0)
            views = torch.randint(256, (2, *spec.view_shape), generator=noise, dtype=torch.uint8)
            for output in (output for output in due if output.model == name):
                tail = Tail(spec, network, spec.base(output.layer), self._layout(output))
                check_reaches(tail, list(views), f"layer {output.layer!r} of {name}")

    def arguments(self, job: Job) -> dict[str, Any]:
        """The models, and which layer of which model each output is of."""
        indices = {ref.name: index for index, ref in enumerate(self._models)}
        places = {
            output.number: _Place(indices[output.model], self._layout(output), self._described[output.model].weights)
            for output in job.due
        }
        return {"models": self._models, "places": places, "probe": self._probe, "factor": self._config.factor}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's effects, block of units by block, each summed over its ranges of images."""
        spec = references.model(next(ref for ref in self._models if ref.name == output.model))
        wanted = min(self._config.images, references.probe(self._probe).manifest().num_rows)
        rows: list[dict[str, object]] = []
        block: list[int] = []
        sums: EffectSums | None = None
        for piece in (*map(of_table, pieces), None):
            units = [] if piece is None else piece["units"].tolist()
            if block and units != block:
                rows += self._rows(block, sums, spec, wanted)
                sums = None
            block = units
            if piece is not None and "images" in piece:
                part = EffectSums.of_state(piece)
                if sums is None:
                    sums = part
                else:
                    sums.merge(part)
        _add_peers(rows, none=bool(self._units))
        columns = {column.name: [row[column.name] for row in rows] for column in EFFECTS.columns[2:]}
        whole = max(int(str(row["whole"])) for row in rows)
        if whole:
            say(
                f"effects of {output.model} {output.layer}: on {whole} images the network cannot be run from the layer "
                "on, so whole passes gave the figures",
                level="warning",
            )
        facts = {"factor": f"{self._config.factor:g}", "whole_passes": str(whole), COMPUTES: self._tells[output.model]}
        facts["linear"] = str(max(int(str(row["linear"])) for row in rows))
        return EFFECTS.table(columns, facts, **output.keys)

    def _rows(
        self, units: Sequence[int], sums: EffectSums | None, spec: ModelSpec, wanted: int
    ) -> Iterator[dict[str, object]]:
        """The rows of a block of units, without peers."""
        images = 0 if sums is None else int(sums.images[0])
        if sums is None or wanted - images > self._how.max_bad * wanted:
            raise MilanError(
                f"{wanted - images} of {wanted} images cannot be read, more than --max-bad {self._how.max_bad:g} "
                "allows: mend them, or allow more."
            )
        classes = sums.probabilities.shape[2]
        names = spec.classes if spec.classes is not None and len(spec.classes) == classes else None
        whole, linear = sums.replayed.tolist()
        for effect in effects(sums, self._config.classes):
            changed = {
                side: [
                    {
                        "class": one.number,
                        "name": None if names is None else names[one.number],
                        "probability": one.probability,
                        "logit": one.logit,
                        "predicted": one.predicted,
                    }
                    for one in found
                ]
                for side, found in (("gained", effect.gained), ("lost", effect.lost))
            }
            figures = {name: getattr(effect, name) for name in ("change", "active", "strength", "moved", "flipped")}
            yield {
                "unit": units[effect.unit], "images": images, "whole": whole, "linear": linear, **figures, **changed
            }  # fmt: skip


def _add_peers(rows: Sequence[dict[str, Any]], none: bool) -> None:
    """Adds each unit's peer, and what the same change of it moved; none where not all units of the layer are there."""
    by_change: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_change.setdefault(row["change"], []).append(row)
    for of_change in by_change.values():
        strengths, active = ([row[name] for row in of_change] for name in ("strength", "active"))
        places = [None] * len(of_change) if none else peers(strengths, active)
        for row, place in zip(of_change, places, strict=True):
            row["peer"] = None if place is None else of_change[place]["unit"]
            row["peer_moved"] = None if place is None else of_change[place]["moved"]


def chosen_images(manifest: pa.Table, count: int) -> pa.Table:
    """A fixed pseudo-random choice of a probe's images: image_id, root and path, in the order of the manifest.

    Args:
        manifest: The probe's manifest.
        count: Images at most.
    """
    ids = manifest["image_id"].to_numpy()
    chosen = np.sort(np.lexsort((ids, scattered(ids)))[:count])
    return manifest.select(["image_id", "root", "path"]).take(pa.array(chosen))


def _class_scores(spec: ModelSpec) -> str:
    """Checks the network's class scores as layers are checked, and returns a fingerprint of them; empty for none.

    Raises:
        MilanError: They depend on other images of a batch, or differ from pass to pass.
    """
    network = references.network(spec)
    layouts = established(spec, network, [OUTPUTS], positions=False)
    return behaviours(spec, network, layouts, None).get(OUTPUTS, "")


def _check_classifier(spec: ModelSpec, latents: bool) -> None:
    """Refuses models that tell no classes, or whose units nothing can be put in the place of.

    Raises:
        MilanError: It is one.
    """
    if spec.images is not None or latents:
        raise MilanError(
            f"{spec.name} is asked for its effects on classes, which generators do not tell: give a classifier."
        )
    if spec.hidden is not None:
        raise MilanError(
            f"units of {spec.name} are taken out of its outputs by hidden=, so that nothing can be put back."
        )
