"""Benchmark of features: a pass that reads sparse dictionaries, against the forward pass and the encoders' products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from milan_ray.benchmarks.harness import Options, Result, compare
from milan_ray.engine import references
from milan_ray.engine.references import ModelRef
from milan_ray.exemplars.feature_maps import PIECE_BYTES
from milan_ray.exemplars.forward import Forward, pass_size
from milan_ray.exemplars.shard import LayerStates, StateConfig
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.given import feature_set
from milan_ray.models.registry import ModelSpec

K = 32
"""Features that a position keeps."""

CASES = (
    ("vit_b_16/imagenet", ("encoder.layers.encoder_layer_6",), 24_576, 16),
    ("resnet18/imagenet", ("layer2", "layer3", "layer4"), 8_192, 64),
)
"""Model, layers, features of each, images."""

SHORT = (("resnet18/imagenet", ("layer4",), 64, 4),)


def run(options: Options) -> Iterator[Result]:
    """Measures one pass with top-k and levels of TopK and ReLU features, in batches as actors take them."""
    for model, layers, count, images in SHORT if options.short else CASES:
        spec = references.model(ModelRef(model, "random", layers))
        network, size = spec.load(), pass_size(spec.batch(128), torch.device("cpu"))
        views = np.random.default_rng(0).integers(0, 256, (images, *spec.view_shape), dtype=np.uint8)
        bare = Forward(spec, network, layers, size)
        maps = bare.maps(views[:size])
        dense = {layer: _dictionary(found, count, None) for layer, found in maps.items()}
        sparse = {layer: _dictionary(found, count, K) for layer, found in maps.items()}
        baseline = partial(_forward_and_product, bare, dense, views, size)
        for kind, sets in ((f"TopK (k = {K})", sparse), ("ReLU", dense)):
            yield compare(
                f"{count:,} {kind} features of {', '.join(layers)} of {model}, against the forward pass and the "
                "encoders' matrix products",
                partial(_dissect, spec, network, sets, views, size),
                baseline,
                options.repeats,
                work=images,
                unit="images",
                warm_up=not options.short,
            )


def _dictionary(maps: torch.Tensor, count: int, k: int | None) -> Dictionary:
    """A random dictionary, of which about one feature in fifty fires at a position where k does not decide."""
    width = maps.shape[1]
    matrix = torch.randn(count, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    pre = rows @ matrix.T
    bias = -(pre.mean(dim=0) + 2 * pre.std(dim=0))
    return Dictionary(Weights(matrix, matrix, bias), "relu" if k is None else "topk", k)


@torch.inference_mode()
def _forward_and_product(forward: Forward, sets: dict[str, Dictionary], views: np.ndarray, size: int) -> None:
    for start in range(0, len(views), size):
        for layer, maps in forward.maps(views[start : start + size]).items():
            rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
            for part in rows.split(max(1, PIECE_BYTES // (4 * sets[layer].count))):
                F.linear(part, sets[layer].encoder, sets[layer].encoder_bias)


def _dissect(spec: ModelSpec, network: nn.Module, sets: dict[str, Dictionary], views: np.ndarray, size: int) -> None:
    features = [feature_set(f"{layer}#random", dictionary) for layer, dictionary in sets.items()]
    own = replace(spec, layers=tuple(each.path for each in features), features={each.path: each for each in features})
    forward = Forward(own, network, own.layers, size)
    states = LayerStates(StateConfig(len(views), 15, 0.99, 2**20, 2**28), torch.get_num_threads(), own.layers)
    for start in range(0, len(views), size):
        ids = np.arange(start, min(start + size, len(views)))
        for rows, maps in forward.sparse_pieces(views[ids]):
            states.update(maps, ids[rows])
