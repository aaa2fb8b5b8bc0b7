"""Checks that features were made for the layer that they are read from."""

from __future__ import annotations

from collections.abc import Collection

import torch

from milan_ray.config import ExemplarConfig
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.exemplars.feature_maps import FeatureMaps
from milan_ray.exemplars.forward import Forward, pass_size, read_inputs
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import Probe
from milan_ray.probe.manifest import image_refs


def check_features(spec: ModelSpec, source: Probe, layers: Collection[str], config: ExemplarConfig) -> None:
    """Checks on the first images of a probe that features reconstruct what their layer puts out.

    The right number of units does not make a layer the right one: widths repeat from block to block, and a wrong
    normalisation changes none. A reconstruction that is worse than the mean is of something else.

    Args:
        spec: The model.
        source: The probe.
        layers: Its layers that are about to be dissected; those that are no feature sets are not checked.
        config: How exemplars are made.

    Raises:
        MilanError: The explained variance is below zero, or the codes are not what they are said to be.
    """
    due = {layer: spec.features[layer] for layer in layers if layer in spec.features}
    if not due:
        return
    cpu = torch.device("cpu")
    size = pass_size(spec.batch(config.batch_size), cpu)
    batch = read_inputs(source, image_refs(source.manifest().slice(0, size)), spec)
    if not len(batch.ids):
        return
    bases = list(dict.fromkeys(features.layer for features in due.values()))
    maps = Forward(spec, references.network(spec), bases, size, config.arithmetic).maps(batch.inputs)
    for features in due.values():
        reader = FeatureMaps(features, cpu)
        reader.check(maps[features.layer])
        explained = reader.explained_variance(maps[features.layer]) if features.reconstructs else 1.0
        if explained < 0:
            raise MilanError(
                f"features {features.name!r} ({features.source}) reconstruct layer {features.layer!r} of {spec.name} "
                f"worse than its mean does: explained variance {explained:.3g} on the first {len(batch.ids)} images. "
                "Give the layer, weights and normalisation that they were made for (docs/features.md)."
            )
