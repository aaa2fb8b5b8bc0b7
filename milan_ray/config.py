"""Frozen configuration records of jobs, and the hash that identifies a configuration."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal


def canonical(config: object) -> str:
    """Formats a configuration as JSON with sorted keys; dataclasses become objects, tuples become lists."""

    def plain(value: object) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        raise TypeError(f"a configuration cannot hold {type(value).__name__}")

    return json.dumps(config, sort_keys=True, ensure_ascii=False, default=plain)


def config_hash(config: Mapping[str, object]) -> str:
    """Hash of a configuration: 16 hex digits, the same on every machine."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fingerprint:
    """Hash of everything that decides the content of a table.

    Attributes:
        hash: Identifies the content.
        inputs: Input → digest, to tell later which input changed.
        all_units: Hash of the same table with all units of its layer.
        units: The units selected; empty for all.
    """

    hash: str
    inputs: dict[str, str]
    all_units: str
    units: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, object], units: tuple[int, ...] = ()) -> Fingerprint:
        """Fingerprint of a configuration: one input per key."""
        chosen = {**config, "units": units} if units else config
        inputs = {name: config_hash({name: value})[:8] for name, value in chosen.items()}
        return cls(config_hash(chosen), inputs, config_hash(config), units)


def data_dir() -> Path:
    """Folder of published datasets: ``$MILAN_DATA_DIR``, else ``./data``."""
    return Path(os.environ.get("MILAN_DATA_DIR", "data")).expanduser().absolute()


def models_dir() -> Path:
    """Folder of weights and checkpoints: ``$MILAN_MODELS_DIR``, else ``./models``."""
    return Path(os.environ.get("MILAN_MODELS_DIR", "models")).expanduser().absolute()


def results_dir() -> Path:
    """Default run directory: ``$MILAN_RESULTS_DIR``, else ``./results``."""
    return Path(os.environ.get("MILAN_RESULTS_DIR", "results")).expanduser().absolute()


@dataclass(frozen=True)
class Arithmetic:
    """How dissected models compute.

    Attributes:
        precision: float32, or bfloat16 or float16 for mixed precision (torch's autocast): activations are rounded to
            8 or 11 bits, more images tie, and exemplars and masks change.
        channels_last: Convolutions keep their channels last in memory: up to a third faster, equal within float
            error. Models that call ``view()`` on their maps refuse it.
    """

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False

    def identity(self) -> object:
        """Value for configuration hashes.

        ``applied`` distinguishes tables of earlier versions, in which another arithmetic than the default did not reach
        the workers.
        """
        return self if self == Arithmetic() else {**asdict(self), "applied": True}


FLOAT32 = Arithmetic()


@dataclass(frozen=True)
class ExemplarConfig:
    """How exemplars are made (paper §3; the reference's defaults).

    Attributes:
        k: Exemplars per unit, images.
        quantile: The threshold η is this quantile of a unit's activations over all positions of all images.
        mask_size: (height, width) of masks in pixels; None means the view's own size (224×224 for ImageNet models).
        batch_size: Images per forward pass, on GPUs; CPUs take at most 16, which is faster there. Results agree to the
            last bit only at the same batch size.
        shard_size: Images per shard: the unit of work, of retry and of progress. Never changes a result. None takes
            up to 256 (1,024 on GPUs), and fewer for small probes, so that several actors have work.
        samples: Positions per unit up to which thresholds are exact; above it they are computed from a fixed
            pseudo-random sample of at least this many.
        map_budget: Bytes of activation maps per layer that a shard stores; above it the maps of the exemplars are
            recomputed afterwards.
        max_bad: Share of unreadable images above which the job fails.
        truncate_bytes: The reference's quirk: views pass through the model's normalisation and back, and decimals are
            cut off; without it, they are the image's own pixels, and a generator's are rounded.
        arithmetic: Precision and memory format of the models.
        pooled: Whether to store every unit's maximum and mean on every image too; never changes another table.
    """

    k: int = 15
    quantile: float = 0.99
    mask_size: tuple[int, int] | None = None
    batch_size: int = 128
    shard_size: int | None = None
    samples: int = 2**20
    map_budget: int = 256 * 2**20
    max_bad: float = 0.1
    truncate_bytes: bool = False
    arithmetic: Arithmetic = FLOAT32
    pooled: bool = False

    def shard(self, images: int) -> int:
        """Images per shard for a probe's number of images: a multiple of the 16 that a CPU takes per pass."""
        return self.shard_size or 16 * min(16, math.ceil(images / 256))

    def for_gpus(self, images: int) -> ExemplarConfig:
        """The configuration with larger shards, unless their size is given: a GPU takes 40 ms for 256 images.

        Args:
            images: Images of the probe.
        """
        return replace(self, shard_size=self.shard_size or 128 * max(1, min(8, images // 1024)))

    def identity(self) -> dict[str, object]:
        """The fields that decide results, for the configuration hash."""
        return {
            "k": self.k,
            "quantile": self.quantile,
            "mask_size": self.mask_size,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "arithmetic": self.arithmetic.identity(),
        }


@dataclass(frozen=True)
class Resources:
    """The part of the cluster that a job may use.

    Attributes:
        address: Ray cluster to join; None starts a local one.
        actors: Most actors of a pool; None takes one per GPU where there are GPUs, else one per CPU.
        cpus_per_actor: CPUs (and torch threads) of each actor. Fixed, because it may change the last bits. Where tasks
            read for actors with GPUs, these have as many threads, but ask for one CPU at most.
        gpus_per_actor: GPUs of each actor, fractions allowed; None takes one where there are GPUs.
        device: Where models run: auto (CUDA where the actor has a GPU), cpu or cuda.
    """

    address: str | None = None
    actors: int | None = None
    cpus_per_actor: float = 1
    gpus_per_actor: float | None = None
    device: str = "auto"

    @property
    def threads(self) -> int:
        """Torch threads of each actor."""
        return max(1, int(self.cpus_per_actor))


BLEU, LOSS = STOP_BY = ("bleu", "loss")
"""What may choose the decoder's epoch on held-out units: BLEU of greedy captions, or the loss per token."""


@dataclass(frozen=True)
class ContrastConfig:
    """Which contrasts are chosen.

    Attributes:
        similar: Images per unit that are most like its exemplars, among those that do not excite it.
        random: Further images per unit, drawn from those that do not excite it.
        quantile: The criterion: an image does not excite a unit if its activation, the maximum over positions, is at
            most this quantile of the unit's activations over the probe, and below that of every exemplar.
        seed: Seed of the random ones.
    """

    similar: int = 15
    random: int = 15
    quantile: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Training of decoder and language model; defaults are the paper's.

    Attributes:
        decoder_batch_size: Captions per step of the decoder.
        lm_batch_size: Captions per step of the language model.
        max_epochs: Epochs at most, of each.
        patience: Epochs without improvement before training stops at the next one.
        hold_out: Share of units held out for validation.
        regularization_weight: Weight of the doubly-stochastic attention regulariser.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        seed: Seed of initial weights, dropout and the order of captions.
        keep_last_weights: Keep the last epoch's weights instead of the best, as the reference does by mistake.
        bf16: Compute forward passes in bfloat16 where that is safe (autocast); weights stay float32.
        stop_by: What the decoder's early stopping compares, of :data:`STOP_BY`; the reference's is BLEU.
    """

    decoder_batch_size: int = 64
    lm_batch_size: int = 128
    max_epochs: int = 100
    patience: int = 4
    hold_out: float = 0.1
    regularization_weight: float = 1.0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    keep_last_weights: bool = False
    bf16: bool = False
    stop_by: str = BLEU
