"""Directions that share channels: how many of them neurons, principal components and sparse autoencoders recover.

    python -m jobs.demo --superposed
    python examples/superposition.py            # with --truth, which takes concept maps for activations, without a demo

The built-in world's network ``world/superposed`` has 27 concepts as known directions of 18 channels. This program
trains small sparse autoencoders in plain torch on what its bottleneck puts out, and prints two tables: by width of the
bottleneck, and by width and sparsity of the autoencoder. docs/features-world.md has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.models.registry import get_model
from milan_ray.scoring.directions import best_features, both_signs, recovered
from milan_ray.world.lexicon import NAMES
from milan_ray.world.superposition import CHANNELS, SuperposedNet, directions, superposed_concepts
from milan_ray.world.training import PREPROCESS, attributes_of, images_of, planted_targets

CHANNEL_COUNTS = (9, 12, CHANNELS)
WIDTHS, SPARSITIES = (32, 64, 128, 256), (2, 3, 4, 6, 8)
SCENES = 1_000
"""Held-out scenes that judge."""


@dataclass(frozen=True)
class SparseCoder:
    """A TopK autoencoder of vectors of C channels.

    Attributes:
        encoder: (width, C).
        bias: (width,).
        decoder: (width, C), rows of length 1.
        mean: (C,), subtracted from the vectors first.
        k: The largest codes of a vector; the others are 0.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    mean: Tensor
    k: int

    def encode(self, vectors: Tensor) -> Tensor:
        """Codes, not negative and at most k of them above 0: (…, width) of vectors (…, C)."""
        codes = F.relu((vectors - self.mean) @ self.encoder.T + self.bias)
        kept = codes.topk(self.k, dim=-1)
        return torch.zeros_like(codes).scatter(-1, kept.indices, kept.values)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (…, C) of codes (…, width)."""
        return codes @ self.decoder + self.mean


def fit_topk(
    vectors: Tensor, width: int, k: int, steps: int = 2_000, batch: int = 512, lr: float = 1e-2, seed: int = 0
) -> SparseCoder:
    """Trains a TopK autoencoder: Adam, unit-norm decoder, mean subtracted, an auxiliary loss against dead features.

    Args:
        vectors: float32 (N, C).
        width: Number of features.
        k: Codes kept per vector.
        steps: Training steps; the learning rate falls to 0 over the second half.
        batch: Vectors per step.
        lr: Learning rate.
        seed: Of the initial weights and the order of the vectors.
    """
    draw = torch.Generator().manual_seed(seed)
    mean = vectors.mean(dim=0)
    scale = (vectors - mean).square().mean().sqrt()
    start = F.normalize(torch.randn(width, vectors.shape[1], generator=draw), dim=1)
    encoder, decoder, bias = (values.clone().requires_grad_() for values in (start, start, torch.zeros(width)))
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=lr)
    idle = torch.zeros(width)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (steps - step) / steps)
        inputs = (vectors[torch.randint(len(vectors), (batch,), generator=draw)] - mean) / scale
        codes = F.relu(inputs @ encoder.T + bias)
        kept = codes.topk(k, dim=1)
        left = inputs - torch.zeros_like(codes).scatter(1, kept.indices, kept.values) @ decoder
        loss = left.square().mean() + _revival(codes[:, idle > 100], decoder[idle > 100], left.detach(), k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
            idle += 1
            idle[kept.indices[kept.values > 0].unique()] = 0
    return SparseCoder(encoder.detach(), bias.detach() * scale, decoder.detach(), mean, k)


def _revival(codes: Tensor, decoder: Tensor, left: Tensor, k: int) -> Tensor:
    """A small loss of what dead features do not explain of the error that the others leave."""
    if not len(decoder):
        return torch.zeros(())
    kept = codes.topk(min(2 * k, len(decoder)), dim=1)
    rest = left - torch.zeros_like(codes).scatter(1, kept.indices, kept.values) @ decoder
    return rest.square().mean() / 32


def principal_components(vectors: Tensor) -> np.ndarray:
    """The principal components of vectors (N, C): (C, C)."""
    components: np.ndarray = torch.linalg.eigh(torch.cov(vectors.T)).eigenvectors.T.numpy()
    return components


def products(rows: np.ndarray) -> Callable[[Tensor], Tensor]:
    """The linear features of directions (F, C): a function of vectors (…, C) to (…, F)."""
    weights = torch.from_numpy(np.ascontiguousarray(rows.T))
    return lambda vectors: vectors @ weights


@dataclass(frozen=True)
class Scenes:
    """Activations of concepts at the positions of scenes, and what the scenes show.

    Attributes:
        activations: float32 (N, 256, F).
        shown: bool (N, F).
    """

    activations: Tensor
    shown: np.ndarray


def scenes_of(split: str, first: int, count: int, network: SuperposedNet | None) -> Scenes:
    """Some scenes' activations, by the network or, without one, by the scenes' concept maps."""
    columns = [NAMES.index(name) for name in superposed_concepts]
    shown = attributes_of(split, first, count)[:, columns].numpy() > 0
    if network is None:
        maps = planted_targets(split, first, count, superposed_concepts).float() / 255
    else:
        with torch.no_grad():
            images = images_of(split, first, count)
            maps = torch.cat([network.activations(PREPROCESS(batch)) for batch in images.split(100)])
    return Scenes(maps.flatten(2).transpose(1, 2).contiguous(), shown)


@dataclass(frozen=True)
class Bottleneck:
    """What a bottleneck of C channels puts out for the scenes that train and choose, and for those that judge."""

    train: Scenes
    judge: Scenes
    true: np.ndarray

    def outputs(self, scenes: Scenes) -> Tensor:
        """(N, 256, C)."""
        return scenes.activations @ torch.from_numpy(self.true)

    def auroc(self, encode: Callable[[Tensor], Tensor], own: bool = False) -> float:
        """Mean AUROC, over concepts, of the features' maxima over positions, on scenes that did not choose them.

        Args:
            encode: (N, 256, C) → (N, 256, features).
            own: Whether feature ``i`` is that of concept ``i``; otherwise each concept has the best feature.
        """
        train, judge = (
            torch.cat([encode(part).amax(dim=1) for part in self.outputs(scenes).split(50)]).numpy()
            for scenes in (self.train, self.judge)
        )
        if own:  # a column of its own per concept
            pairs = zip(train.T, self.train.shown.T, judge.T, self.judge.shown.T, strict=True)
            each = [best_features(*(values[:, None] for values in pair)).auroc[0] for pair in pairs]
            return float(np.mean(each))
        return float(np.mean(best_features(train, self.train.shown, judge, self.judge.shown).auroc))


def by_channels(train: Scenes, judge: Scenes, steps: int) -> Iterator[Sequence[object]]:
    """Rows of the first table: what neurons, components, known directions and an autoencoder do, by channels."""
    for channels in CHANNEL_COUNTS:
        true = directions(len(superposed_concepts), channels)
        layer = Bottleneck(train, judge, true)
        vectors = layer.outputs(train).flatten(0, 1)
        neurons = both_signs(np.eye(channels, dtype=np.float32))
        components = both_signs(principal_components(vectors))
        for name, rows in (("neurons", neurons), ("principal components", components)):
            yield channels, name, recovered(rows, true), layer.auroc(products(rows))
        for k in SPARSITIES[:3]:
            coder = fit_topk(vectors, 128, k, steps)
            name = f"TopK autoencoder, 128 features, k = {k}"
            yield channels, name, recovered(coder.decoder.numpy(), true), layer.auroc(coder.encode)
        for name, rows in (("true directions", true), ("their pseudo-inverse", np.linalg.pinv(true).T)):
            yield channels, name, recovered(rows, true), layer.auroc(products(rows), own=True)


def by_width(train: Scenes, judge: Scenes, steps: int, seeds: int) -> Iterator[Sequence[object]]:
    """Rows of the second table: what autoencoders of the bottleneck recover, by width and sparsity."""
    layer = Bottleneck(train, judge, directions())
    vectors = layer.outputs(train).flatten(0, 1)
    total = (vectors - vectors.mean(dim=0)).square().mean()
    for width in WIDTHS:
        for k in SPARSITIES:
            coders = [fit_topk(vectors, width, k, steps, seed=seed) for seed in range(seeds)]
            shares = [recovered(coder.decoder.numpy(), layer.true) for coder in coders]
            codes = coders[0].encode(vectors[::7])
            error = (vectors[::7] - coders[0].decode(codes)).square().mean()
            dead = float((codes > 0).any(dim=0).logical_not().float().mean())
            judged = layer.auroc(coders[0].encode)
            span = f"{np.mean(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"
            yield width, k, span, float(1 - error / total), dead, judged


def table(head: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    """Prints a table as Markdown, row by row as they come."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", action="store_true", help="concept maps in place of the network's activations")
    parser.add_argument("--scenes", type=int, default=1_500, help="scenes that train and choose")
    parser.add_argument("--steps", type=int, default=2_000, help="training steps of an autoencoder")
    parser.add_argument("--seeds", type=int, default=3, help="autoencoders per width and sparsity")
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = None if args.truth else get_model("world/superposed").load()
    assert network is None or isinstance(network, SuperposedNet)
    train = scenes_of("probe", 0, args.scenes, network)
    judge = scenes_of("heldout", 0, SCENES, network)
    active = float((train.activations > 0.05).float().sum(dim=2).mean())
    print(f"{len(superposed_concepts)} concepts, of which {active:.1f} are on at a position; {args.scenes} scenes\n")
    table(("channels", "features", "recovered", "AUROC"), by_channels(train, judge, args.steps))
    head = ("width", "k", f"recovered, {args.seeds} seeds", "explained variance", "dead", "AUROC")
    table(head, by_width(train, judge, args.steps, args.seeds))


if __name__ == "__main__":
    from milan_ray.plugins import load_plugins

    load_plugins()
    main()
