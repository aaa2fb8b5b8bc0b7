"""CoSy (docs/scores.md): does a unit fire more on images generated from its description than on the probe?

descriptions ─► distinct texts ─► [actor pool: generate, forward] ─► activations ─┐
pooled ───────────────────────────────────────────────────────────────────────────┴─► [per layer] ─► unit_scores
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import nn

from milan_ray.config import Arithmetic, ExemplarConfig, Fingerprint, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.stage import Job, Known, Output, Shard, ShardedStage, Shards, ShardWorker
from milan_ray.engine.tasks import FEW_IMAGES
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import pass_size
from milan_ray.exemplars.pooled import maxima, means
from milan_ray.models.generators import Generator, GeneratorRef
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.schema import POOLED, UNIT_SCORES
from milan_ray.scoring.simulation import retrieval
from milan_ray.stages.arithmetic import Forwards, arithmetics_of
from milan_ray.stages.embeddings import lists_of, rows_of
from milan_ray.stages.scores.inputs import (
    ROWS_SCHEMA,
    SYSTEMS,
    Described,
    ScoreConfig,
    Texts,
    UnitActivations,
    unit_scores,
    upstream,
)
from milan_ray.storage import Storage

KERNEL_VERSION = "cosy-1"

TEXTS = 8
"""Texts per shard."""

COUNT = 50
"""Images per text: the reference's."""


@dataclass(frozen=True)
class CosyConfig:
    """How images are generated.

    Attributes:
        count: Images per text.
        seed: Their seed.
        template: The generator's prompt; ``{}`` stands for the description. CoSy's is ``realistic photo of a close
            up of {}``.
    """

    count: int = COUNT
    seed: int = 0
    template: str = "{}"

    def __post_init__(self) -> None:
        if "{}" not in self.template:
            raise MilanError(f"the prompt {self.template!r} has no {{}} in the place of the description.")


@dataclass(frozen=True)
class Network:
    """A model that is run on generated images.

    Attributes:
        ref: The model.
        weights: Digest of its weights.
        layers: Layer → how it was dissected.
    """

    ref: references.ModelRef
    weights: str
    layers: dict[str, Arithmetic]


class CosyWorker(ShardWorker):
    """Generates images of texts and pools the activations of a model's units for them."""

    def __init__(
        self,
        networks: list[Network],
        ref: GeneratorRef,
        plugins: tuple[str, ...],
        cosy: CosyConfig,
        pooling: str,
        **context: Any,
    ) -> None:
        super().__init__(**context)
        self._networks, self._cosy = networks, cosy
        self._pool = means if pooling == "mean" else maxima
        self._generator: Generator = references.load(ref, plugins).to(self._device)
        self._forward = ModelCache(self._load)

    def __call__(self, row: Row) -> Row:
        """Runs a few texts of one model."""
        spec, forward = self._forward(row["model"])
        pieces: dict[int, list[pa.Table]] = defaultdict(list)
        for text, units_of in zip(row["texts"], row["units"], strict=True):
            images = self._generator.generate(
                self._cosy.template.replace("{}", text), self._cosy.count, self._cosy.seed
            )
            views = np.stack([spec.preprocess.view(Image.fromarray(image)) for image in images])
            pooled = self._activations(spec, forward, views)
            for number, units in zip(row["outputs"], units_of, strict=True):
                values = lists_of(pooled[self._outputs[number].layer][:, units].T)
                texts = pa.array([text] * len(units), pa.string())
                columns = {"text": texts, "unit": pa.array(units, pa.int64()), "activations": values}
                pieces[number].append(pa.table(columns))
        self._store(row, ((number, pa.concat_tables(tables)) for number, tables in pieces.items()))
        return {}

    def _load(self, index: int) -> tuple[ModelSpec, Forwards]:
        network = self._networks[index]
        spec = references.model(network.ref)
        size = pass_size(spec.batch(ExemplarConfig().batch_size), self._device)

        def build() -> nn.Module:
            return references.network(spec, network.weights).to(self._device)

        return spec, Forwards(spec, build, network.layers, size)

    def _activations(self, spec: ModelSpec, forward: Forwards, views: np.ndarray) -> dict[str, np.ndarray]:
        """Layer → pooled activations of N views, float32 (N, U)."""
        size = pass_size(spec.batch(ExemplarConfig().batch_size), self._device)
        pooled: dict[str, list[np.ndarray]] = defaultdict(list)
        for start in range(0, len(views), size):
            for layer, maps in forward.maps(views[start : start + size]).items():
                pooled[layer].append(self._pool(maps).cpu().numpy())
        return {layer: np.concatenate(parts) for layer, parts in pooled.items()}


class CosyScores(ShardedStage):
    """Scores of descriptions by images generated from them.

    Images of every distinct text of a model are generated once, whichever units and labelers it comes from.

    Args:
        described: The descriptions to score.
        probe: The probe of their exemplars, which is the control.
        models: The described models.
        ref: The generator.
        cosy: How to generate.
        config: How to pool, and which images of the probe count.

    Raises:
        MilanError: The generator or a model's weights are missing.
    """

    worker = CosyWorker
    table, name, counted = UNIT_SCORES, "cosy", "texts"

    def __init__(
        self,
        described: Sequence[Described],
        probe: references.ProbeRef,
        models: Sequence[references.ModelRef],
        ref: GeneratorRef,
        cosy: CosyConfig,
        config: ScoreConfig,
    ) -> None:
        self._described, self._config, self._cosy = described, config, cosy
        self._ref, self._plugins = ref, probe.plugins
        self._models = {model.name: model for model in models}
        self._digest = probe_digest(references.probe(probe).manifest())
        self._identity = {
            "kernel": KERNEL_VERSION,
            "generator": references.load(ref, probe.plugins).identity(),
            "cosy": cosy,
            "config": config,
        }
        self._weights = {
            name: weights_digest(references.network(references.model(model))) for name, model in self._models.items()
        }
        self.title, self.label = f"scores by {ref.name}", f"scores ({ref.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every labeler's descriptions of every layer."""
        for layer in self._described:
            above = {"weights": self._weights[layer.model], **upstream(known.storage, layer, self._digest)}
            yield Output({"predictor": self._ref.name, **layer.keys}, Fingerprint.of({**self._identity, **above}))

    def shards(self, job: Job) -> Shards:
        """A few texts of one model each, with the units of each output that they describe."""
        units: dict[str, dict[str, dict[int, set[int]]]] = {name: {} for name in self._models}
        for output in job.due:
            texts = Texts.read(job.storage, Described.of(output), self._config.seed)
            for of_system in texts.systems.values():
                for unit, text in zip(texts.units, of_system, strict=True):
                    units[output.model].setdefault(text, {}).setdefault(output.number, set()).add(unit)
        shards = []
        for index, of_text in enumerate(units.values()):
            every = sorted(of_text)
            for start in range(0, len(every), TEXTS):
                texts_of_shard = every[start : start + TEXTS]
                outputs = tuple(sorted({number for text in texts_of_shard for number in of_text[text]}))
                wanted = [[sorted(of_text[text].get(number, ())) for number in outputs] for text in texts_of_shard]
                row = {"model": index, "texts": texts_of_shard, "units": wanted}
                name = f"{index}/{config_hash({'texts': texts_of_shard})}"
                shards.append(Shard(name, outputs, row, len(texts_of_shard)))
        return Shards(shards, all(job.storage.count(POOLED, **o.of_layer) <= FEW_IMAGES for o in job.due))

    def arguments(self, job: Job) -> dict[str, Any]:
        """The models, and how images are generated."""
        layers = {name: sorted({o.layer for o in job.due if o.model == name}) for name in self._models}
        networks = [
            Network(model, self._weights[name], arithmetics_of(job.storage, name, layers[name], POOLED))
            for name, model in self._models.items()
        ]
        how = {"ref": self._ref, "plugins": self._plugins, "cosy": self._cosy, "pooling": self._config.pooling}
        return {"networks": networks, **how}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """Compares the activations for generated images with those for the probe."""
        generated: dict[tuple[str, int], np.ndarray] = {}
        for piece in pieces:
            keys = zip(piece["text"].to_pylist(), piece["unit"].to_pylist(), strict=True)
            generated |= dict(zip(keys, rows_of(piece["activations"]), strict=True))
        layer = Described.of(output)
        texts = Texts.read(storage, layer, self._config.seed)
        responses = UnitActivations.read(storage, layer, texts.units, self._config, None)
        rows: list[dict[str, object]] = []
        for column, unit in enumerate(texts.units):
            control = responses.activations[responses.use[:, column], column]
            for system in SYSTEMS:
                text = texts.systems[system][column]
                own = generated[text, unit]
                own = own[np.isfinite(own)]
                alive = len(control) > 0 and control.min() < control.max()
                both = np.concatenate([own, control])
                scores = retrieval(both, np.arange(len(both)) < len(own)) if alive else (np.nan, np.nan)
                about = {"unit": unit, "system": system, "description": text, "images": len(both)}
                metrics = zip(("cosy-auc", "cosy-mad"), scores, strict=True)
                rows += [about | {"metric": metric, "value": value} for metric, value in metrics]
        return unit_scores(output.keys, pa.Table.from_pylist(rows, schema=ROWS_SCHEMA))
