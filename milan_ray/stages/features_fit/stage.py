"""The stage that fits feature sets to a layer, measures them, and writes them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import ExemplarConfig, Fingerprint
from milan_ray.engine import references
from milan_ray.engine.cluster import on_gpus
from milan_ray.engine.run_log import Cost
from milan_ray.engine.stage import Job, Known, Output, StepStage, publish
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import check_probe
from milan_ray.exemplars.shard import StateConfig
from milan_ray.models.class_numbers import class_numbers
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.moments import Moments
from milan_ray.models.features.pca import component_dictionary
from milan_ray.models.hooks import unwrap
from milan_ray.models.splice import Splice
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import say
from milan_ray.schema import FEATURES_FIT
from milan_ray.stages.exemplars import ModelWork, Run, store_manifest
from milan_ray.stages.exemplars.describe_model import AFTER_ACTIVATIONS, DescribedModel, describe_model
from milan_ray.stages.features_fit.config import NMF, PCA, SAES, FitJob
from milan_ray.stages.features_fit.factors import factorise
from milan_ray.stages.features_fit.figures import HELD_OUT, MEAN, PLAIN, SPLICED, Figures, FiguresWorker, merged
from milan_ray.stages.features_fit.output import FIT, files_of, of_bytes, place_of, to_bytes, why_written
from milan_ray.stages.features_fit.passes import layer_moments, run_pass
from milan_ray.stages.features_fit.training import SaeTask, train
from milan_ray.storage import Storage
from milan_ray.storage.files import WORK

KERNEL_VERSION = "features-fit-1"


class FeaturesFit(StepStage):
    """Feature sets of one layer, of one method and several widths.

    The activations of the probe are never stored: every pass runs the network again, and keeps what its outputs add up
    to.

    Args:
        job: What is fitted, and how.
        config: How the network is run.
    """

    table, name, title = FEATURES_FIT, "features-fit", "features"

    def __init__(self, job: FitJob, config: ExemplarConfig) -> None:
        self._job, self._config = job, config
        self._described: DescribedModel | None = None

    def folder(self, storage: Storage) -> Storage:
        """Where the sets are written."""
        spec = references.model(self._job.model)
        usual = "/".join(["features", quote(spec.name, safe=" "), quote(spec.layers[0], safe=" ")])
        return Storage(self._job.config.out or storage.uri(usual))

    def outputs(self, known: Known) -> Iterator[Output]:
        """The figures of each set, by what the layer puts out on the images, and how it is fitted.

        Raises:
            MilanError: The network, the layer or the probe cannot be used, or a width does not fit the layer.
        """
        spec, source = references.model(self._job.model), references.probe(self._job.probe)
        if len(spec.layers) != 1 or spec.features:
            raise MilanError(f"features are fitted to one layer: give --layer, one of those of {spec.name}.")
        check_probe(spec, source)
        self._described = describe_model(spec, source, probe_digest(source.manifest()), self._config)
        (layer,) = spec.layers
        inputs = self._described.fingerprints[layer].inputs
        outputs = {name: digest for name, digest in inputs.items() if name not in AFTER_ACTIVATIONS}
        matrix, folder = self._job.config.method == PCA, self.folder(known.storage)
        for name, width in self._sets().items():
            fit = {"fit": KERNEL_VERSION, **self._job.config.identity(width)}
            fingerprint = Fingerprint.of({**outputs, **fit})
            why = why_written(folder, name, matrix, fingerprint.hash)
            keys = {"model": spec.name, "layer": layer, "features": name}
            current = known.storage.why(FEATURES_FIT, fingerprint, **keys)
            yield Output(keys, fingerprint, reason=current or why)

    def _sets(self) -> dict[str, int]:
        assert self._described is not None
        (layout,) = self._described.layouts.values()
        return self._job.config.names(layout.units)

    def run(self, job: Job) -> None:
        """Fits, measures and writes the sets that are due.

        Raises:
            MilanError: The layer's outputs cannot be used, or the network fails.
        """
        started = time.monotonic()
        manifest, digest = store_manifest(job.storage, self._job.probe)
        config = self._config.for_gpus(len(manifest)) if on_gpus(job.resources) else self._config
        run = Run(job.storage, self._job.probe, config, job.resources)
        item = self._item(job, digest, len(manifest))
        moments = layer_moments(run, item, self._job.config.held_out)
        every = self._sets()
        due = {output.keys["features"]: every[output.keys["features"]] for output in job.due}
        places = {name: f"{WORK}/{job.work}/sets/{name}" for name in due}
        new = {name: width for name, width in due.items() if not job.storage.exists(places[name])}
        for name, dictionary in (self._fitted(run, item, moments, new) if new else {}).items():
            job.storage.put(places[name], to_bytes(dictionary))
        dictionaries = {name: of_bytes(job.storage.get(place)) for name, place in places.items()}
        labelled = self._store_classes(job.storage, item, manifest)
        pieces = run_pass(
            run, item, FiguresWorker, "figures", "figures of features", share=self._job.config.held_out,
            sets=list(due), mean=moments.mean.tolist(), labelled=labelled,
        )  # fmt: skip
        figures = merged(pieces, list(due))
        cost = Cost()
        cost.add(time.monotonic() - started, len(due), len(manifest))
        for output in job.due:
            name = output.keys["features"]
            self._publish(job.storage, output, dictionaries[name], figures[name], cost)

    def _item(self, job: Job, digest: str, images: int) -> ModelWork:
        """The network and its layer, for workers of passes."""
        assert self._described is not None
        layers = tuple(self._described.layouts)
        config = self._config
        plan = StateConfig(images, config.k, config.quantile, config.samples, config.map_budget)
        return ModelWork(self._job.model, self._described, layers, layers, digest, job.work, plan)

    def _fitted(self, run: Run, item: ModelWork, moments: Moments, due: Mapping[str, int]) -> dict[str, Dictionary]:
        """Set → dictionary."""
        most = max(due.values())
        if moments.positions <= most and self._job.config.method in (PCA, NMF):
            raise MilanError(
                f"the images have {moments.positions} positions in layer {item.layers[0]!r}, too few for {most} "
                "features: give more images, a layer with more positions, or a smaller --width."
            )
        if self._job.config.method == PCA:
            return {name: component_dictionary(moments, width) for name, width in due.items()}
        if self._job.config.method == NMF:
            return factorise(run, item, self._job.config, moments, due)
        return train(SaeTask(run, item, self._job.config, moments, due))

    def _store_classes(self, storage: Storage, item: ModelWork, manifest: pa.Table) -> bool:
        """Stores the number of each image's class for workers; returns False where there is nothing to classify."""
        labels = manifest["class_label"].to_pylist()
        if all(label is None for label in labels):
            return False
        spec = references.model(item.model)
        try:
            if spec.images is not None:
                raise MilanError(f"{spec.name} generates images.")
            classes, numbers = class_numbers(labels, spec)
            _check_classifier(item, len(classes))
        except MilanError as error:
            say(f"no accuracy with features in the layer: {error}")
            return False
        storage.put(f"{WORK}/{item.work}/classes", np.array(numbers, np.int64).tobytes())
        return True

    def _publish(
        self, storage: Storage, output: Output, dictionary: Dictionary, figures: Mapping[str, Figures], cost: Cost
    ) -> None:
        """Writes a set's files, then its figures, and says them."""
        folder, name, config = self.folder(storage), output.keys["features"], self._job.config
        place = folder.uri(place_of(name, config.method == PCA))
        rows = [self._row(split, place, dictionary, one) for split, one in figures.items()]
        for path, content in files_of(name, dictionary, output.layer, self._metadata(output, rows)).items():
            folder.put(path, content)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        publish(storage, FEATURES_FIT, output, FEATURES_FIT.table(columns, **output.keys), self.name, cost)
        say(f"{output.model} {output.layer}#{name}: {summary(rows)}\n  {place}")

    def _row(self, split: str, place: str, dictionary: Dictionary, figures: Figures) -> dict[str, object]:
        config, statistics = self._job.config, figures.statistics
        explained = statistics.explained_variance
        return {
            "split": split,
            "method": config.method,
            "width": dictionary.count,
            "k": config.k if config.method in SAES else None,
            "images": figures.images,
            "positions": statistics.positions,
            "l0": statistics.l0,
            "explained_variance": None if math.isnan(explained) else explained,
            "dead": statistics.dead_share,
            "accuracy": figures.accuracy(PLAIN),
            "spliced_accuracy": figures.accuracy(SPLICED),
            "mean_accuracy": figures.accuracy(MEAN),
            "file": place,
        }

    def _metadata(self, output: Output, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """What the files say of a set; under the names of SAELens where it has some."""
        assert self._described is not None
        config = self._job.config
        kept = ("split", "images", "positions", "l0", "explained_variance", "dead", "accuracy", "spliced_accuracy")
        return {
            "model_name": output.model,
            "hook_name": output.layer,
            "milan_ray_model": output.model,
            "milan_ray_layer": output.layer,
            "milan_ray_weights": self._described.weights,
            "milan_ray_activations": self._job.model.activations,
            FIT: output.fingerprint.hash,
            "milan_ray_how": config.identity(int(str(rows[0]["width"]))),
            "milan_ray_figures": [{key: row[key] for key in kept} for row in rows],
        }


def _check_classifier(item: ModelWork, classes: int) -> None:
    """Checks that a network tells so many classes, also with other values in its layer.

    Raises:
        MilanError: It does not.
    """
    spec = references.model(item.model)
    network = references.network(spec)
    if spec.hidden is not None:
        raise MilanError(
            f"units of {spec.name} are taken out of its outputs by hidden=, so that nothing can be put back."
        )
    ((layer, layout),) = item.described.layouts.items()
    views = torch.zeros(2, *spec.view_shape, dtype=torch.uint8)
    splice = Splice(spec, unwrap(network), layer, layout)
    splice.logits(views, torch.zeros(2, layout.width, *layout.grid))
    logits = splice.logits(views, None)
    if logits.shape[1] < classes:
        raise MilanError(f"{spec.name} does not put out a row of logits for each image and {classes} classes.")
    if not logits.isfinite().all():  # those that the layer does not need may be missing from the weights
        raise MilanError(f"the weights of {spec.name} do not tell classes.")


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """A set's figures in a line: of held-out images where there are any."""
    row = next((row for row in rows if row["split"] == HELD_OUT), rows[0])
    where = "on held-out images" if row["split"] == HELD_OUT else "on the images fitted to"
    explained = row["explained_variance"]
    parts = [f"L0 {row['l0']:.1f}", f"dead {row['dead']:.1%}"]
    parts.insert(1, "nothing varies" if explained is None else f"explained variance {explained:.3f}")
    if row["spliced_accuracy"] is not None:
        parts.append(
            f"accuracy {row['spliced_accuracy']:.1%} spliced in, {row['accuracy']:.1%} without, "
            f"{row['mean_accuracy']:.1%} with the layer's mean"
        )
    return f"{', '.join(parts)} {where} ({row['images']} images)"
