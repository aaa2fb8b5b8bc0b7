"""Cut-and-paste adversarial images: descriptions ─► units ─► what they fire at, pasted elsewhere ─► wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from spacy.language import Language
from torch import nn

from milan_ray.config import Arithmetic, Fingerprint, Resources
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.model_cache import loaded_model
from milan_ray.engine.tasks import run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward, pass_size
from milan_ray.models.heads import find_head, strongest_classes
from milan_ray.models.registry import OUTPUTS, ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.report import figures
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, FIGURE, LEVELS, PASTED
from milan_ray.stages.arithmetic import arithmetic_of
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.ablation.run import class_numbers
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.analysis.run import described_model, read_descriptions
from milan_ray.studies.cut_and_paste.statistics import (
    CRITERION,
    DIFFERENT,
    LARGEST,
    TARGETS,
    best_examples,
    choose_units,
    describe_rates,
    grown,
    paste,
    rates,
)
from milan_ray.studies.exemplar_images import exemplar_views, model_views, unit_exemplars, unit_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL_VERSION = "cut-and-paste-1"

IMAGES = 512
"""Images per task that looks for originals."""

UNITS = 4
"""Units per task that pastes."""


@dataclass(frozen=True)
class PastingConfig:
    """How adversarial images are made.

    Attributes:
        labeler: Whose descriptions.
        units: Units with the highest word difference, and as many others.
        originals: Images that are pasted on, per unit.
        distractors: Exemplars that are cut from, per unit, at most.
        pool: Images, of those given, among which originals are chosen.
        targets: Classes per unit that it may mislead to.
        seed: Of the choice of images and of the other units.
    """

    labeler: str = "milan"
    units: int = 20
    originals: int = 8
    distractors: int = 8
    pool: int = 2000
    targets: int = TARGETS
    seed: int = 0


@dataclass(frozen=True)
class _Scan:
    model: references.ModelRef
    layer: str
    units: tuple[int, ...]
    probe: references.ProbeRef
    refs: tuple[ImageRef, ...]
    threads: int
    device: str
    arithmetic: Arithmetic


@dataclass(frozen=True)
class _Unit:
    """A unit with its material: originals and controls of the probe given, exemplars by image id, their masks."""

    unit: int
    targets: tuple[int, ...]
    originals: tuple[ImageRef, ...]
    labels: tuple[int, ...]
    controls: tuple[ImageRef, ...]
    distractors: tuple[int, ...]
    masks: tuple[bytes, ...]


@dataclass(frozen=True)
class _Paste:
    storage: Storage
    model: references.ModelRef
    layer: str
    probe: references.ProbeRef
    units: tuple[_Unit, ...]
    threads: int
    device: str


@dataclass(frozen=True)
class _Guesses:
    """Numbers of classes: of distractors and controls alone (n,), and of the originals with their cuts (m, n)."""

    distractors: np.ndarray
    controls: np.ndarray
    pasted: np.ndarray
    control_pasted: np.ndarray


def run_pasting(
    storage: Storage,
    model: references.ModelRef,
    probe: references.ProbeRef,
    nlp: Language,
    language: str,
    config: PastingConfig,
    resources: Resources,
    name: str = "cut-and-paste",
) -> pl.DataFrame:
    """Pastes what units fire at on images that they are silent on, and sees what the classifier makes of it.

    Units are of the layer whose units the classifier's last layer reads: there, weights say which unit supports which
    class.

    Args:
        storage: The run directory, which holds exemplars and descriptions of that layer.
        model: The classifier.
        probe: Images with classes, to paste on.
        nlp: The spaCy pipeline that reads descriptions; it must have word vectors.
        language: What it is called.
        config: How.
        resources: What of the cluster to use; Ray must be connected.
        name: Name of the experiment in the tables.

    Returns:
        Rows of schema PASTED.

    Raises:
        MilanError: Descriptions or word vectors are missing, the model does not end in a linear map over a described
            layer, or no image can be pasted on.
    """
    spec, layers = described_model(storage, model, config.labeler)
    manifest, digest = store_manifest(storage, probe)
    fingerprint, layer, weight = pasting_fingerprint(storage, spec, layers, probe, digest, language, config)
    keys = {"model": spec.name, "layer": layer}
    public = {"experiment": name, "model": spec.name}
    if storage.why(PASTED, fingerprint, **public) is None:
        say(f"{name} of {spec.name}: up to date")
        return pl.DataFrame(pl.from_arrow(storage.read(PASTED, **public)))
    say(f"{name}: sentences are read by {language}")
    scores = analysis.unit_scores(
        read_descriptions(storage, (layer,), {"labeler": config.labeler, "model": spec.name}), nlp, ()
    )
    if CRITERION not in scores.columns:
        raise MilanError(f"{language} has no word vectors, which say how different words are: choose --language.")
    chosen = choose_units(scores, config.units, config.seed)
    numbers = tuple(chosen["unit"].to_list())
    classes, labels = class_numbers(manifest["class_label"].to_pylist(), spec)
    pool = np.random.default_rng(config.seed).permutation(len(manifest))[: config.pool]
    guesses, maxima = _scan_images(
        replace(model, layers=layers),
        layer,
        numbers,
        probe,
        image_refs(manifest, pool),
        resources,
        arithmetic_of(storage, spec.name, layer),
    )
    level = _levels(storage, keys)
    material = []
    for place, unit in enumerate(numbers):
        silent = (maxima[:, place] <= level[unit]) & (guesses == np.array(labels)[pool])
        targets = tuple(strongest_classes(weight, unit, config.targets))
        good = pool[silent & ~np.isin(guesses, targets)]
        refs = image_refs(manifest, good[: config.originals + config.distractors])
        distractors, cuts = _exemplars(storage, spec.name, layer, unit, float(level[unit]), config.distractors)
        if len(refs) < 2 or not distractors:
            continue
        # Where few images are silent some serve as both; on itself a control changes nothing.
        originals, controls = refs[: config.originals], (refs * config.distractors)[-len(distractors) :]
        of = tuple(labels[ref.image_id] for ref in originals)
        material.append(_Unit(unit, targets, tuple(originals), of, tuple(controls), distractors, cuts))
    tasks = [
        _Paste(
            storage,
            replace(model, layers=layers),
            layer,
            probe,
            tuple(material[start : start + UNITS]),
            resources.threads,
            resources.device,
        )
        for start in range(0, len(material), UNITS)
    ]
    found: dict[int, _Guesses] = {}
    with Progress(f"adversarial images for {spec.name}", len(material), "units") as shown:
        for index, results in run_parallel(_paste, tasks, resources.cpus_per_actor, gpus_each(resources)):
            found |= {unit.unit: guess for unit, guess in zip(tasks[index].units, results, strict=True)}
            shown.advance(len(results))
    rows = _rows(public, chosen, material, found, classes)
    if not rows:
        raise MilanError(
            f"nothing to paste: none of the units of {spec.name} {layer} has an exemplar that is taken for none of its "
            f"classes and whose mask covers less than {LARGEST:.0%} of it, and images given that it is silent on and "
            "that the model classifies correctly: give more images, or --each more units."
        )
    table = PASTED.table({column.name: [row[column.name] for row in rows] for column in PASTED.columns})
    frame = pl.DataFrame(pl.from_arrow(table))
    for ending, picture in figures.files(_draw_examples(storage, model, layer, probe, frame)).items():
        storage.put(figure_path(storage, public, ending), picture)
    storage.write(PASTED, table, fingerprint, **public)  # last: it says that all is done
    return frame


def pasting_fingerprint(
    storage: Storage,
    spec: ModelSpec,
    layers: Sequence[str],
    probe: references.ProbeRef,
    digest: str,
    language: str,
    config: PastingConfig,
) -> tuple[Fingerprint, str, torch.Tensor]:
    """What decides adversarial images, the layer that the classifier's last one reads, and that one's weights.

    Args:
        storage: The run directory.
        spec: The classifier.
        layers: Its layers, which are described.
        probe: The images to paste on.
        digest: Theirs.
        language: What the pipeline is called that reads descriptions.
        config: How.

    Raises:
        MilanError: The model does not end in a linear map over a described layer, which has no exemplars.
    """
    network = spec.load()
    weight = _head_weight(spec, network, probe)
    layer = _last_layer(storage, spec, layers, weight.shape[1], config.labeler)
    keys = {"model": spec.name, "layer": layer}
    fingerprint = Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "descriptions": storage.config_of(DESCRIPTIONS, labeler=config.labeler, **keys),
            "exemplars": storage.config_of(EXEMPLARS, **keys),
            "weights": weights_digest(network),
            "probe": digest,
            "language": language,
            "pasting": config,
        }
    )
    return fingerprint, layer, weight


def figure_path(storage: Storage, public: dict[str, str], ending: str) -> str:
    """Where the figure lies, below the storage's root."""
    return storage.path(PASTED, **public).replace("data.parquet", f"{FIGURE}.{ending}")


def _head_weight(spec: ModelSpec, network: nn.Module, probe: references.ProbeRef) -> torch.Tensor:
    if spec.bands not in (None, 3):
        raise MilanError(f"{spec.name} takes {spec.bands} bands: exemplars are kept, and can be pasted, in RGB alone.")
    first = model_views(probe, image_refs(references.probe(probe).manifest().slice(0, 1)), spec)
    head = network.get_submodule(find_head(spec, network, torch.from_numpy(first)))
    assert isinstance(head, nn.Linear)
    return head.weight


def _last_layer(storage: Storage, spec: ModelSpec, layers: Sequence[str], width: int, labeler: str) -> str:
    """The last layer with as many units as the head reads."""
    for layer in reversed(layers):
        if storage.count(DESCRIPTIONS, labeler=labeler, model=spec.name, layer=layer) == width:
            return layer
    raise MilanError(
        f"none of the described layers of {spec.name} has the {width} units that its last layer reads: describe all "
        "units of the layer before it."
    )


def _levels(storage: Storage, keys: dict[str, str]) -> np.ndarray:
    table = pl.DataFrame(pl.from_arrow(storage.read(LEVELS, ["unit", "level"], **keys))).sort("unit")
    levels: np.ndarray = table["level"].to_numpy()
    return levels


def _exemplars(
    storage: Storage, model: str, layer: str, unit: int, level: float, count: int
) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Exemplars of a unit to cut from, best first: those with a mask that leaves most of the image."""
    rows = unit_exemplars(storage, model, layer, unit).filter(pl.col("activation") > level)
    cuts = unit_masks(storage, model, layer, rows["mask"].to_list())
    shares = [float(grown(cut, (cut.shape[0], cut.shape[1])).mean()) for cut in cuts]
    rows = rows.filter([0 < share <= LARGEST for share in shares]).head(count)
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
    model: references.ModelRef,
    layer: str,
    units: tuple[int, ...],
    probe: references.ProbeRef,
    refs: Sequence[ImageRef],
    resources: Resources,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, np.ndarray]:
    """What the model takes images for (n,), and the units' maxima on them (n, units), computed as their levels were."""
    how = resources.threads, resources.device, arithmetic
    tasks = [
        _Scan(model, layer, units, probe, tuple(refs[start : start + IMAGES]), *how)
        for start in range(0, len(refs), IMAGES)
    ]
    found = dict(run_parallel(_scan, tasks, resources.cpus_per_actor, gpus_each(resources)))
    return tuple(np.concatenate([found[number][part] for number in range(len(tasks))]) for part in (0, 1))  # type: ignore[return-value]


def _scan(task: _Scan) -> tuple[np.ndarray, np.ndarray]:
    torch.set_num_threads(task.threads)
    device = resolve_device(task.device)
    spec, forward, size = _forward(task.model, task.layer, str(device), task.arithmetic)
    views = model_views(task.probe, task.refs, spec)
    guesses, maxima = [], []
    for start in range(0, len(views), size):
        maps = forward.maps(views[start : start + size])
        guesses.append(maps[OUTPUTS].flatten(1).argmax(-1).cpu().numpy())
        maxima.append(maps[task.layer].amax(dim=(2, 3))[:, list(task.units)].float().cpu().numpy())
    return np.concatenate(guesses), np.concatenate(maxima)


def _cuts(storage: Storage, model: str, layer: str, packed: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    return np.stack([grown(mask, size) for mask in unit_masks(storage, model, layer, packed)])


def _paste(task: _Paste) -> list[_Guesses]:
    torch.set_num_threads(task.threads)
    device = resolve_device(task.device)
    spec, network = loaded_model(task.model, str(device))

    @torch.inference_mode()
    def guess(images: np.ndarray) -> np.ndarray:
        shape, flat = images.shape[:-3], torch.from_numpy(images.reshape(-1, *images.shape[-3:]))
        found = [
            network(spec.prepare(some.to(device))).argmax(-1).cpu()
            for some in flat.split(pass_size(spec.batch(128), device))
        ]
        answers: np.ndarray = torch.cat(found).numpy().reshape(shape)
        return answers

    results = []
    for unit in task.units:
        originals, controls = (model_views(task.probe, refs, spec) for refs in (unit.originals, unit.controls))
        distractors = exemplar_views(task.storage, spec.name, task.layer, unit.distractors)
        cuts = _cuts(task.storage, spec.name, task.layer, unit.masks, (originals.shape[1], originals.shape[2]))
        results.append(
            _Guesses(
                guess(distractors),
                guess(controls),
                guess(paste(originals, distractors, cuts)),
                guess(paste(originals, controls, cuts)),
            )
        )
    return results


def _rows(
    public: dict[str, str],
    chosen: pl.DataFrame,
    material: Sequence[_Unit],
    found: dict[int, _Guesses],
    classes: Sequence[str],
) -> list[dict[str, object]]:
    """Rows of schema PASTED, one per original and cut; not of exemplars that are taken for a target themselves."""
    of = {row["unit"]: row for row in chosen.iter_rows(named=True)}

    def name(number: int) -> str:
        return classes[number] if number < len(classes) else f"class {number}"

    rows: list[dict[str, object]] = []
    for unit in material:
        guess = found[unit.unit]
        for i, (original, label) in enumerate(zip(unit.originals, unit.labels, strict=True)):
            for j, (distractor, control) in enumerate(zip(unit.distractors, unit.controls, strict=True)):
                answers = int(guess.pasted[i, j]), int(guess.control_pasted[i, j])
                sources = int(guess.distractors[j]), int(guess.controls[j])
                if sources[0] in unit.targets:  # what is pasted is then what is seen
                    continue
                fooled = [
                    answer in unit.targets and answer not in (label, shown)
                    for answer, shown in zip(answers, sources, strict=True)
                ]
                rows.append(
                    {
                        **public,
                        **of[unit.unit],
                        "targets": [name(target) for target in unit.targets],
                        "original": original.image_id,
                        "original_class": name(label),
                        "distractor": distractor,
                        "distractor_class": name(sources[0]),
                        "predicted": name(answers[0]),
                        "fooled": fooled[0],
                        "control": control.image_id,
                        "control_class": name(sources[1]),
                        "control_predicted": name(answers[1]),
                        "control_fooled": fooled[1],
                    }
                )
    return rows


def _draw_examples(
    storage: Storage, model: references.ModelRef, layer: str, probe: references.ProbeRef, rows: pl.DataFrame
) -> Figure:
    """Figure 14 of the paper with this network's units: what was pasted, on what, and what came of it."""
    spec = references.model(model)
    manifest = references.probe(probe).manifest()
    shown = best_examples(rows)
    if not len(shown):
        shown = rows.filter(pl.col("group") == DIFFERENT).unique("unit", keep="first", maintain_order=True).head(3)
    figure = figures.new_figure(7.2, 2.5 * len(shown) + 0.5)
    panels = figure.subplots(len(shown), 3, squeeze=False)
    for axes, row in zip(panels, shown.iter_rows(named=True), strict=True):
        original = model_views(probe, image_refs(manifest, [row["original"]]), spec)
        distractor = exemplar_views(storage, spec.name, layer, [row["distractor"]])
        of_it = unit_exemplars(storage, spec.name, layer, row["unit"]).filter(pl.col("image_id") == row["distractor"])
        cut = _cuts(storage, spec.name, layer, of_it["mask"].to_list(), (original.shape[1], original.shape[2]))
        titles = (row["original_class"], row["distractor_class"], f"taken for {row['predicted']}")
        images = (original[0], distractor[0], paste(original, distractor, cut)[0, 0])
        for place, image, title in zip(axes, images, titles, strict=True):
            place.imshow(image)
            place.set_title(title, fontsize="small")
            place.set_xticks([])
            place.set_yticks([])
        axes[1].contour(cut[0], [0.5], colors="red", linewidths=0.8)
        text = f"{layer} {row['unit']}\n“{row['description']}”\nspeaks for\n" + ",\n".join(row["targets"])
        axes[0].set_ylabel(text, fontsize="x-small", rotation=0, ha="right", va="center")
    figure.suptitle(f"{spec.name}: what a unit fires at, pasted where it does not belong", fontsize="small")
    return figure


def summary(rows: pl.DataFrame) -> str:
    """How often pasting misled, by group of units."""
    units = rows.select("layer", "unit").unique().height
    made = f"{len(rows):,} images with something pasted on, for {units} units of {rows['layer'][0]}"
    return f"{made}; share taken for a class of the unit's that neither image shows:\n{describe_rates(rates(rows))}"
