"""CoSy (docs/scores.md): does a unit fire more on images generated from its description than on the probe?

descriptions ─► distinct texts ─► [actor pool: generate, forward] ─► activations ─┐
pooled ───────────────────────────────────────────────────────────────────────────┴─► [per layer] ─► unit_scores
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from milan_ray.config import Arithmetic, ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.engine.tasks import removed_if_damaged, retry_if_overtaken
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import pass_size
from milan_ray.exemplars.pooled import maxima, means
from milan_ray.models.generators import Generator, GeneratorRef
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import Progress, say
from milan_ray.schema import POOLED, UNIT_SCORES
from milan_ray.scoring.simulation import retrieval
from milan_ray.stages.arithmetic import Forwards, arithmetics_of
from milan_ray.stages.embeddings import lists_of, rows_of
from milan_ray.stages.scores import (
    ROWS_SCHEMA,
    SYSTEMS,
    Described,
    ScoreConfig,
    Seen,
    Texts,
    by_described,
    summarise,
    upstream,
    write_unit_scores,
)
from milan_ray.storage import Storage

KERNEL_VERSION = "cosy-1"

TEXTS = 8
"""Texts per piece of work."""

COUNT = 50
"""Images per text: the reference's."""


@dataclass(frozen=True)
class CosyConfig:
    """How images are generated.

    Attributes:
        count: Images per text.
        seed: Their seed.
        template: What the generator is told; ``{}`` stands for the description. CoSy's is ``realistic photo of a close
            up of {}``.
    """

    count: int = COUNT
    seed: int = 0
    template: str = "{}"

    def __post_init__(self) -> None:
        if "{}" not in self.template:
            raise MilanError(f"the prompt {self.template!r} has no {{}} in the place of the description.")


@retry_if_overtaken
def run_cosy(
    storage: Storage,
    described: Sequence[Described],
    probe: references.ProbeRef,
    models: Sequence[references.ModelRef],
    ref: GeneratorRef,
    cosy: CosyConfig,
    config: ScoreConfig,
    resources: Resources,
) -> list[str]:
    """Scores every description whose scores are missing or stale, by images generated from it.

    Every distinct text of a model is drawn once, whichever units and labelers it comes from.

    Args:
        storage: The run directory, which holds descriptions, exemplars and pooled activations.
        described: What to score.
        probe: The probe that they are of: the control.
        models: The models described.
        ref: The generator.
        cosy: How to generate.
        config: How to pool, and which images of the probe count.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        The experiments of table ``scores``, one per model.

    Raises:
        MilanError: Pooled activations, the generator or a model's weights are missing.
    """
    digest = probe_digest(references.probe(probe).manifest())
    generator = references.generator(ref, probe.plugins)
    by_name = {model.name: model for model in models}
    weights = weights_of(models)
    stage = CosyScores(described, ref, generator, digest, weights, cosy, config)
    outputs = by_described(stage.outputs(Known(storage)))
    work = config_hash({"cosy": [output.fingerprint.hash for output in outputs.values()]})
    due = [what for what in described if stage.why(storage, outputs[what])]
    if not due:
        storage.remove_work(work)
        say(f"scores by {ref.name}: all up to date")
        return summarise(storage, ref.name, sorted({what.model for what in described}), config)
    with removed_if_damaged(storage, work):
        texts = {what: Texts.read(storage, what, config.seed) for what in due}
        wanted: dict[str, dict[str, dict[str, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
        for what, said in texts.items():
            for own in said.systems.values():
                for unit, text in zip(said.units, own, strict=True):
                    wanted[what.model][text][what.layer].add(unit)
        stored = set(storage.work_names(work))
        names = list(by_name)
        rows: list[Row] = []
        place: dict[tuple[str, str], tuple[str, int]] = {}
        for model, of_texts in wanted.items():
            every = sorted(of_texts)
            for start in range(0, len(every), TEXTS):
                some = every[start : start + TEXTS]
                name = f"{names.index(model)}/{config_hash({'texts': some})}"
                place |= {(model, text): (name, number) for number, text in enumerate(some)}
                units = [{layer: sorted(of) for layer, of in of_texts[text].items()} for text in some]
                if f"drawn/{name}" not in stored:
                    rows.append({"name": name, "model": names.index(model), "texts": some, "units": units})
        say(f"scores by {ref.name}: {len(due)} layers and labelers, {sum(len(row['texts']) for row in rows)} texts")
        arguments = {
            "storage": storage,
            "work": work,
            "models": [by_name[name] for name in names],
            "weights": [weights[name] for name in names],
            "layers": [
                arithmetics_of(storage, name, sorted({w.layer for w in due if w.model == name}), POOLED)
                for name in names
            ],
            "generator": ref,
            "cosy": cosy,
            "pooling": config.pooling,
            "plugins": probe.plugins,
            "threads": resources.threads,
            "device": resources.device,
        }
        costs = {what: Cost() for what in due}
        sharing = {number: [what for what in due if what.model == name] for number, name in enumerate(names)}
        with Progress(f"scores ({ref.name})", sum(len(row["texts"]) for row in rows), "texts") as progress:
            for answer in run_pool(CosyWorker, arguments, rows, resources):
                progress.advance(answer["texts"])
                for what in sharing[answer["model"]]:
                    costs[what].add(answer["seconds"], len(sharing[answer["model"]]))
        for what, said in texts.items():
            table = _score_layer(storage, work, what, said, place, config)
            run = outputs[what].fingerprint.hash
            record_run(storage, "cosy", run, what.model, layer=what.layer, rows=len(table), cost=costs[what])
            write_unit_scores(storage, outputs[what], table)
    storage.remove_work(work)
    return summarise(storage, ref.name, sorted({what.model for what in described}), config)


def weights_of(models: Sequence[references.ModelRef]) -> dict[str, str]:
    """Model → digest of its weights."""
    return {model.name: weights_digest(references.network(references.model(model))) for model in models}


class CosyScores(Stage):
    """Scores of descriptions by generated images; :func:`run_cosy` makes them together.

    Args:
        described: What to score.
        ref: The generator.
        generator: The same, loaded.
        digest: Digest of the probe manifest.
        weights: Of :func:`weights_of`.
        cosy: How to draw.
        config: How to pool, and which images of the probe count.
    """

    table, name = UNIT_SCORES, "cosy"

    def __init__(
        self,
        described: Sequence[Described],
        ref: GeneratorRef,
        generator: Generator,
        digest: str,
        weights: Mapping[str, str],
        cosy: CosyConfig,
        config: ScoreConfig,
    ) -> None:
        self._described, self._digest, self._weights = described, digest, weights
        self._predictor, self.title = ref.name, f"scores by {ref.name}"
        self._identity = {
            "kernel": KERNEL_VERSION,
            "generator": generator.identity(),
            "cosy": cosy,
            "config": config,
        }

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every labeler's descriptions of every layer."""
        for what in self._described:
            above = {"weights": self._weights[what.model], **upstream(known.storage, what, self._digest)}
            yield Output({"predictor": self._predictor, **what.keys}, Fingerprint.of({**self._identity, **above}))


class CosyWorker:
    """Draws images of texts and looks at what a model makes of them."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        models: list[references.ModelRef],
        weights: list[str],
        layers: list[dict[str, Arithmetic]],
        generator: GeneratorRef,
        cosy: CosyConfig,
        pooling: str,
        plugins: tuple[str, ...],
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._models, self._weights = storage, work, models, weights
        self._layers, self._cosy = layers, cosy
        self._pool = means if pooling == "mean" else maxima
        self._device = resolve_device(device)
        self._generator: Generator = references.generator(generator, plugins).to(self._device)
        self._forward = ModelCache(self._load)

    def __call__(self, row: Row) -> Row:
        """Draws a few texts."""
        spec, forward = self._forward(row["model"])
        found = []
        for number, text in enumerate(row["texts"]):
            images = self._generator.generate(
                self._cosy.template.replace("{}", text), self._cosy.count, self._cosy.seed
            )
            views = np.stack([spec.preprocess.view(Image.fromarray(image)) for image in images])
            pooled = self._activations(spec, forward, views)
            for layer, units in row["units"][number].items():
                values = pooled[layer][:, units].T
                columns = {"unit": units, "text": [number] * len(units), "layer": [layer] * len(units)}
                found.append(pa.table({**columns, "activations": lists_of(values)}))
        self._storage.put_work(self._work, f"drawn/{row['name']}", pa.concat_tables(found))
        return {"model": row["model"], "texts": len(row["texts"])}

    def _load(self, index: int) -> tuple[ModelSpec, Forwards]:
        spec = references.model(self._models[index])
        size = pass_size(spec.batch(ExemplarConfig().batch_size), self._device)

        def build() -> nn.Module:
            return references.network(spec, self._weights[index]).to(self._device)

        return spec, Forwards(spec, build, self._layers[index], size)

    def _activations(self, spec: ModelSpec, forward: Forwards, views: np.ndarray) -> dict[str, np.ndarray]:
        """Layer → pooled activations of N views, float32 (N, U)."""
        size = pass_size(spec.batch(ExemplarConfig().batch_size), self._device)
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for start in range(0, len(views), size):
            for layer, maps in forward.maps(views[start : start + size]).items():
                found[layer].append(self._pool(maps).cpu().numpy())
        return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _score_layer(
    storage: Storage,
    work: str,
    what: Described,
    texts: Texts,
    place: dict[tuple[str, str], tuple[str, int]],
    config: ScoreConfig,
) -> pa.Table:
    """Compares what a layer's units make of the images of their descriptions with what they make of the probe."""
    drawn: dict[tuple[str, int, int], np.ndarray] = {}
    for name in sorted({place[what.model, text][0] for text in texts.every()}):
        table = storage.get_work(work, f"drawn/{name}")
        of = zip(table["layer"].to_pylist(), table["text"].to_pylist(), table["unit"].to_pylist(), strict=True)
        for (layer, text, unit), values in zip(of, rows_of(table["activations"]), strict=True):
            if layer == what.layer:
                drawn[name, text, unit] = values
    seen = Seen.read(storage, what, texts.units, config, None)
    rows: list[dict[str, object]] = []
    for column, unit in enumerate(texts.units):
        control = seen.activations[seen.use[:, column], column]
        for system in SYSTEMS:
            text = texts.systems[system][column]
            own = drawn[(*place[what.model, text], unit)]
            own = own[np.isfinite(own)]
            alive = len(control) > 0 and control.min() < control.max()
            both = np.concatenate([own, control])
            found = retrieval(both, np.arange(len(both)) < len(own)) if alive else (np.nan, np.nan)
            rows += [
                {
                    "unit": unit,
                    "system": system,
                    "description": text,
                    "metric": metric,
                    "value": value,
                    "images": len(both),
                }
                for metric, value in zip(("cosy-auc", "cosy-mad"), found, strict=True)
            ]
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)
