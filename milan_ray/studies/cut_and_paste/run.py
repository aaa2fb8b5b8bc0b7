"""Cut-and-paste adversarial images: descriptions ─► units ─► cuts of their exemplars, pasted elsewhere ─► answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from spacy.language import Language
from torch import nn

from milan_ray.config import Arithmetic, Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.model_cache import loaded_model
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward, pass_size
from milan_ray.models.class_numbers import class_numbers
from milan_ray.models.heads import find_head, strongest_classes
from milan_ray.models.registry import OUTPUTS, ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, LEVELS, PASTED
from milan_ray.stages.arithmetic import arithmetic_of
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.cut_and_paste import statistics as pasting
from milan_ray.studies.cut_and_paste.plot import Example, plot_examples
from milan_ray.studies.exemplar_images import exemplar_views, model_views, unit_exemplars, unit_masks
from milan_ray.studies.tables import described_model, frame_of, read_descriptions, read_frame, table_of
from milan_ray.studies.tasks import run_tasks, worker_device

KERNEL_VERSION = "cut-and-paste-1"

IMAGES = 512
"""Images per task that looks for originals."""

UNITS_PER_TASK = 4
"""Units per task that pastes."""


@dataclass(frozen=True)
class CutAndPasteConfig:
    """How adversarial images are made.

    Attributes:
        labeler: Labeler whose descriptions are read.
        units: Number of units with the highest word difference, and of other units.
        originals: Images that are pasted on, per unit.
        distractors: Maximum number of exemplars that are cut from, per unit.
        pool: Number of the given images among which originals are chosen.
        targets: Number of classes per unit that its cuts may mislead to.
        seed: Seed of the choice of images and of the other units.
    """

    labeler: str = "milan"
    units: int = 20
    originals: int = 8
    distractors: int = 8
    pool: int = 2000
    targets: int = pasting.TARGETS
    seed: int = 0


@dataclass(frozen=True)
class _Scan:
    """Images to look for originals among."""

    model: references.ModelRef
    layer: str
    units: tuple[int, ...]
    probe: references.ProbeRef
    arithmetic: Arithmetic
    resources: Resources
    refs: tuple[ImageRef, ...]


@dataclass(frozen=True)
class _Unit:
    """A unit with its classes, originals (with labels) and controls of the given probe, and exemplars with masks."""

    unit: int
    targets: tuple[int, ...]
    originals: tuple[ImageRef, ...]
    labels: tuple[int, ...]
    controls: tuple[ImageRef, ...]
    distractors: tuple[int, ...]
    masks: tuple[bytes, ...]


@dataclass(frozen=True)
class _Paste:
    """Units to make images for."""

    storage: Storage
    model: references.ModelRef
    layer: str
    probe: references.ProbeRef
    classes: tuple[str, ...]
    resources: Resources
    units: tuple[_Unit, ...]

    def name(self, number: int) -> str:
        """Name of a class."""
        return self.classes[number] if number < len(self.classes) else f"class {number}"


@dataclass(frozen=True)
class _LastLayer:
    """The layer that a classifier's last linear map reads.

    Attributes:
        storage: The run directory, which describes it.
        probe: Images with classes, to paste on.
        model: The classifier, with its described layers.
        spec: Its specification.
        network: Its network.
        layer: The layer.
        weight: Weights of the map, float32 (classes, units).
    """

    storage: Storage
    probe: references.ProbeRef
    model: references.ModelRef
    spec: ModelSpec
    network: nn.Module
    layer: str
    weight: torch.Tensor

    @property
    def keys(self) -> dict[str, str]:
        """Partition keys of tables about the layer."""
        return {"model": self.spec.name, "layer": self.layer}


@dataclass(frozen=True)
class CutAndPaste(Stage):
    """Adversarial images and a classifier's answers to them.

    The units belong to the layer before the classifier's last layer, because the last layer's weights tell which unit
    supports which class.

    Attributes:
        model: The classifier.
        probe: Images with classes, to paste on.
        language: Name of the spaCy pipeline that reads descriptions.
        config: Settings.
        name: Name of the experiment in the tables.
    """

    table = PASTED

    model: references.ModelRef
    probe: references.ProbeRef
    language: str
    config: CutAndPasteConfig
    name: str = "cut-and-paste"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The answers, determined by descriptions, exemplars, weights and images.

        Raises:
            MilanError: The model does not end in a linear map over a described layer, or that has no exemplars.
        """
        last = self.last_layer(known.storage)
        yield Output(
            {"experiment": self.name, "model": last.spec.name},
            Fingerprint.of(
                {
                    "kernel": KERNEL_VERSION,
                    "descriptions": known.config(DESCRIPTIONS, labeler=self.config.labeler, **last.keys),
                    "exemplars": known.config(EXEMPLARS, **last.keys),
                    "weights": weights_digest(last.network),
                    "probe": digest(references.probe(self.probe).manifest()),
                    "language": self.language,
                    "pasting": self.config,
                }
            ),
        )

    def last_layer(self, storage: Storage) -> _LastLayer:
        """The layer that the classifier's last linear map reads.

        Raises:
            MilanError: The model does not end in such a map, or the layer is not described.
        """
        spec, layers = described_model(storage, self.model, self.config.labeler)
        network = spec.load()
        weight = _head_weight(spec, network, self.probe)
        layer = _described_layer(storage, spec, layers, weight.shape[1], self.config.labeler)
        return _LastLayer(storage, self.probe, replace(self.model, layers=layers), spec, network, layer, weight)

    def run(self, storage: Storage, nlp: Language, resources: Resources) -> pl.DataFrame:
        """Pastes what units respond to into images that they are silent on, and stores the classifier's answers.

        Args:
            storage: The run directory, which holds exemplars and descriptions of the layer.
            nlp: The spaCy pipeline that reads descriptions; it must have word vectors.
            resources: The part of the cluster to use; Ray must be connected.

        Returns:
            Rows of schema PASTED.

        Raises:
            MilanError: Descriptions or word vectors are missing, the model does not end in a linear map over a
                described layer, or no image can be pasted on.
        """
        manifest, _ = store_manifest(storage, self.probe)
        (output,) = self.outputs(Known(storage))
        if self.why(storage, output) is None:
            say(f"{self.name} of {output.model}: up to date")
            return read_frame(storage, PASTED, **output.keys)
        say(f"{self.name}: sentences are read by {self.language}")
        last = self.last_layer(storage)
        texts = read_descriptions(storage, last.spec.name, (last.layer,), self.config.labeler)
        scores = analysis.unit_scores(texts, nlp, ())
        if pasting.CRITERION not in scores.columns:
            raise MilanError(
                f"{self.language} has no word vectors, which say how different words are: choose --language."
            )
        chosen = pasting.choose_units(scores, self.config.units, self.config.seed)
        classes, labels = class_numbers(manifest["class_label"].to_pylist(), last.spec)
        material = _material(last, self.config, chosen["unit"].to_list(), manifest, labels, resources)
        rows = _answers(last, material, classes, resources)
        if not rows:
            raise MilanError(
                f"nothing to paste: none of the units of {last.spec.name} {last.layer} has an exemplar that is taken "
                f"for none of its classes and whose mask covers less than {pasting.LARGEST:.0%} of it, and images "
                "given that it is silent on and that the model classifies correctly: give more images, or --each more "
                "units."
            )
        answers = pl.DataFrame(rows).with_columns(pl.col("unit").cast(chosen.schema["unit"]))
        table = table_of(PASTED, answers.join(chosen, on="unit", maintain_order="left"), **output.keys)
        frame = frame_of(table)
        figure = plot_examples(last.spec.name, _shown(last, manifest, frame))
        store_figure(storage, PASTED, figure, **output.keys)
        storage.write(PASTED, table, output.fingerprint, **output.keys)  # last: marks the result as complete
        return frame


def _material(
    last: _LastLayer,
    config: CutAndPasteConfig,
    units: list[int],
    manifest: pa.Table,
    labels: list[int],
    resources: Resources,
) -> list[_Unit]:
    """What to paste on which images, for each unit that has both."""
    pool = np.random.default_rng(config.seed).permutation(len(manifest))[: config.pool]
    guesses, maxima = _scan_images(last, units, image_refs(manifest, pool), resources)
    level = read_frame(last.storage, LEVELS, ["unit", "level"], **last.keys).sort("unit")["level"].to_numpy()
    material = []
    for place, unit in enumerate(units):
        silent = (maxima[:, place] <= level[unit]) & (guesses == np.array(labels)[pool])
        targets = tuple(strongest_classes(last.weight, unit, config.targets))
        good = pool[silent & ~np.isin(guesses, targets)]
        refs = image_refs(manifest, good[: config.originals + config.distractors])
        distractors, cuts = _exemplars(last, unit, float(level[unit]), config.distractors)
        if len(refs) < 2 or not distractors:
            continue
        # If few images are silent, some serve as both; pasted on itself, a control changes nothing.
        originals, controls = refs[: config.originals], (refs * config.distractors)[-len(distractors) :]
        numbers = tuple(labels[ref.image_id] for ref in originals)
        material.append(_Unit(unit, targets, tuple(originals), numbers, tuple(controls), distractors, cuts))
    return material


def _answers(
    last: _LastLayer, material: Sequence[_Unit], classes: tuple[str, ...], resources: Resources
) -> list[dict[str, object]]:
    """The classifier's answers: a row per unit, original and cut."""
    common = last.storage, last.model, last.layer, last.probe, classes, resources
    tasks = [
        _Paste(*common, tuple(material[start : start + UNITS_PER_TASK]))
        for start in range(0, len(material), UNITS_PER_TASK)
    ]
    label = f"adversarial images for {last.spec.name}"
    answers = dict(run_tasks(_paste, tasks, resources, label, "units", size=lambda task: len(task.units)))
    return [row for index in range(len(tasks)) for row in answers[index]]


def _head_weight(spec: ModelSpec, network: nn.Module, probe: references.ProbeRef) -> torch.Tensor:
    if spec.bands not in (None, 3):
        raise MilanError(f"{spec.name} takes {spec.bands} bands: exemplars are kept, and can be pasted, in RGB alone.")
    first = model_views(probe, image_refs(references.probe(probe).manifest().slice(0, 1)), spec)
    head = network.get_submodule(find_head(spec, network, torch.from_numpy(first)))
    assert isinstance(head, nn.Linear)
    return head.weight


def _described_layer(storage: Storage, spec: ModelSpec, layers: Sequence[str], width: int, labeler: str) -> str:
    """The last described layer with as many units as the head reads."""
    for layer in reversed(layers):
        if storage.count(DESCRIPTIONS, labeler=labeler, model=spec.name, layer=layer) == width:
            return layer
    raise MilanError(
        f"none of the described layers of {spec.name} has the {width} units that its last layer reads: describe all "
        "units of the layer before it."
    )


def _exemplars(last: _LastLayer, unit: int, level: float, count: int) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Exemplars of a unit to cut from, best first, with their masks; masks that cover most of the image are skipped."""
    rows = unit_exemplars(last.storage, unit=unit, **last.keys).filter(pl.col("activation") > level)
    cuts = unit_masks(last.storage, packed=rows["mask"].to_list(), **last.keys)
    shares = [float(pasting.grown(cut, (cut.shape[0], cut.shape[1])).mean()) for cut in cuts]
    rows = rows.filter([0 < share <= pasting.LARGEST for share in shares]).head(count)
    return tuple(rows["image_id"].to_list()), tuple(rows["mask"].to_list())


@lru_cache(maxsize=1)
def _forward(
    ref: references.ModelRef, layer: str, device: str, arithmetic: Arithmetic
) -> tuple[ModelSpec, Forward, int]:
    """The model with taps on a layer and its output, and how many images it takes at a time."""
    spec = references.model(ref)
    size = pass_size(spec.batch(128), torch.device(device))
    return spec, Forward(spec, spec.load().to(device), [layer, OUTPUTS], size, arithmetic), size


def _scan_images(
    last: _LastLayer, units: Sequence[int], refs: Sequence[ImageRef], resources: Resources
) -> tuple[np.ndarray, np.ndarray]:
    """The model's answers to images (n,), and the units' maxima on them (n, units), computed as their levels were."""
    arithmetic = arithmetic_of(last.storage, last.spec.name, last.layer)
    common = last.model, last.layer, tuple(units), last.probe, arithmetic, resources
    tasks = [_Scan(*common, tuple(refs[start : start + IMAGES])) for start in range(0, len(refs), IMAGES)]
    label = f"images to paste on for {last.spec.name}"
    parts = dict(run_tasks(_scan, tasks, resources, label, "images", size=lambda task: len(task.refs)))
    guesses, maxima = zip(*(parts[index] for index in range(len(tasks))), strict=True)
    return np.concatenate(guesses), np.concatenate(maxima)


def _scan(task: _Scan) -> tuple[np.ndarray, np.ndarray]:
    device = worker_device(task.resources)
    spec, forward, size = _forward(task.model, task.layer, str(device), task.arithmetic)
    views = model_views(task.probe, task.refs, spec)
    guesses, maxima = [], []
    for start in range(0, len(views), size):
        maps = forward.maps(views[start : start + size])
        guesses.append(maps[OUTPUTS].flatten(1).argmax(-1).cpu().numpy())
        maxima.append(maps[task.layer].amax(dim=(2, 3))[:, list(task.units)].float().cpu().numpy())
    return np.concatenate(guesses), np.concatenate(maxima)


def _cuts(storage: Storage, model: str, layer: str, packed: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    return np.stack([pasting.grown(mask, size) for mask in unit_masks(storage, model, layer, packed)])


def _paste(task: _Paste) -> list[dict[str, object]]:
    device = worker_device(task.resources)
    spec, network = loaded_model(task.model, str(device))

    @torch.inference_mode()
    def classify(images: np.ndarray) -> list[Any]:
        """Class numbers of images of any leading shape, as nested lists of that shape."""
        shape, flat = images.shape[:-3], torch.from_numpy(images.reshape(-1, *images.shape[-3:]))
        batches = flat.split(pass_size(spec.batch(128), device))
        numbers = torch.cat([network(spec.prepare(batch.to(device))).argmax(-1).cpu() for batch in batches])
        nested: list[Any] = numbers.reshape(shape).tolist()
        return nested

    rows: list[dict[str, object]] = []
    for unit in task.units:
        originals, controls = (model_views(task.probe, refs, spec) for refs in (unit.originals, unit.controls))
        distractors = exemplar_views(task.storage, spec.name, task.layer, unit.distractors)
        cuts = _cuts(task.storage, spec.name, task.layer, unit.masks, (originals.shape[1], originals.shape[2]))
        alone = classify(distractors), classify(controls)
        pasted = (
            classify(pasting.paste(originals, distractors, cuts)),
            classify(pasting.paste(originals, controls, cuts)),
        )
        for i, (original, label) in enumerate(zip(unit.originals, unit.labels, strict=True)):
            for j, (distractor, control) in enumerate(zip(unit.distractors, unit.controls, strict=True)):
                sources, answers = [shown[j] for shown in alone], [shown[i][j] for shown in pasted]
                if sources[0] in unit.targets:  # the answer would then be correct
                    continue
                fooled = [
                    answer in unit.targets and answer not in (label, source)
                    for answer, source in zip(answers, sources, strict=True)
                ]
                rows.append(
                    {
                        "unit": unit.unit,
                        "targets": [task.name(target) for target in unit.targets],
                        "original": original.image_id,
                        "original_class": task.name(label),
                        "distractor": distractor,
                        "distractor_class": task.name(sources[0]),
                        "predicted": task.name(answers[0]),
                        "fooled": fooled[0],
                        "control": control.image_id,
                        "control_class": task.name(sources[1]),
                        "control_predicted": task.name(answers[1]),
                        "control_fooled": fooled[1],
                    }
                )
    return rows


def _shown(last: _LastLayer, manifest: pa.Table, rows: pl.DataFrame) -> list[Example]:
    """The examples of the figure."""
    shown = pasting.best_examples(rows)
    if not len(shown):
        shown = (
            rows.filter(pl.col("group") == pasting.DIFFERENT).unique("unit", keep="first", maintain_order=True).head(3)
        )
    examples = []
    for row in shown.iter_rows(named=True):
        original = model_views(last.probe, image_refs(manifest, [row["original"]]), last.spec)
        distractor = exemplar_views(last.storage, image_ids=[row["distractor"]], **last.keys)
        exemplar = unit_exemplars(last.storage, unit=row["unit"], **last.keys)
        exemplar = exemplar.filter(pl.col("image_id") == row["distractor"])
        size = (original.shape[1], original.shape[2])
        cut = _cuts(last.storage, last.spec.name, last.layer, exemplar["mask"].to_list(), size)
        targets = ",\n".join(row["targets"])
        examples.append(
            Example(
                f"{last.layer} {row['unit']}\n“{row['description']}”\nspeaks for\n{targets}",
                (row["original_class"], row["distractor_class"], f"taken for {row['predicted']}"),
                (original[0], distractor[0], pasting.paste(original, distractor, cut)[0, 0]),
                cut[0],
            )
        )
    return examples


def summary(rows: pl.DataFrame) -> str:
    """How often pasting misled, by group of units."""
    units = rows.select("layer", "unit").unique().height
    made = f"{len(rows):,} images with something pasted on, for {units} units of {rows['layer'][0]}"
    shares = pasting.describe_rates(pasting.rates(rows))
    return f"{made}; share taken for a class of the unit's that neither image shows:\n{shares}"
