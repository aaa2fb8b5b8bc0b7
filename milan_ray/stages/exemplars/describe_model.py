"""Fingerprints of the tables of a model's layers: model, layouts of the layers, probe and configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from milan_ray.config import ExemplarConfig, Fingerprint, config_hash
from milan_ray.engine import references
from milan_ray.errors import DamagedTable
from milan_ray.exemplars.behaviour import COMPUTES, behaviours, same
from milan_ray.exemplars.forward import check_probe
from milan_ray.exemplars.pooled import POOLED_VERSION
from milan_ray.exemplars.shard import KERNEL_VERSION
from milan_ray.models.establish import established
from milan_ray.models.hooks import find_layers, unwrap
from milan_ray.models.inputs import check_network
from milan_ray.models.layouts import Layout
from milan_ray.models.order import places
from milan_ray.models.registry import ModelSpec, blaming, source_of
from milan_ray.models.weights import nbytes, weights_digest
from milan_ray.probe.base import LatentProbe, Probe
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import say
from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.stages.images import view_key
from milan_ray.storage import Storage, inputs_of

AFTER_ACTIVATIONS = ("kernel", "k", "quantile", "mask_size", "samples")
"""Inputs of exemplars on which no activation depends."""


@dataclass(frozen=True)
class DescribedModel:
    """Inputs that the exemplars of a model depend on.

    Attributes:
        weights: Digest of its weights.
        view: Key of the view that shows its exemplars.
        fingerprints: Layer → what decides its exemplars.
        layouts: Layer → how its output is read.
        order: Layer → its place among the model's modules.
        computes: Layer → its output for fixed inputs (:mod:`milan_ray.exemplars.behaviour`).
        nbytes: Size of its weights.
    """

    weights: str
    view: str
    fingerprints: dict[str, Fingerprint]
    layouts: dict[str, Layout]
    order: dict[str, int]
    computes: dict[str, str]
    nbytes: int


def describe_model(spec: ModelSpec, source: Probe, probe: str, config: ExemplarConfig) -> DescribedModel:
    """Builds a model and determines how its layers are read.

    Args:
        spec: The model.
        source: The probe; a generator is tried on its first inputs.
        probe: Digest of its manifest.
        config: How exemplars are made.

    Raises:
        MilanError: The model cannot be built, has no such layer, or a layer cannot be read.
    """
    model = references.network(spec)
    latents = None
    if isinstance(source, LatentProbe):
        latents = source.latents(image_refs(source.manifest().slice(0, 3)))
    with blaming(f"model {spec.name} cannot be looked at"):
        find_layers(model, map(spec.base, spec.layers))
        check_network(spec.name, unwrap(model))
        weights = weights_digest(model)
        view = view_key(spec, model, weights, config)
        layouts = established(spec, model, spec.layers, latents)
        fingerprints = exemplar_fingerprints(spec, model, weights, view, probe, config, layouts)
        computes = behaviours(spec, model, layouts, latents)
    order = places(unwrap(model), spec.layers)
    return DescribedModel(weights, view, fingerprints, layouts, order, computes, nbytes(model))


def exemplar_fingerprints(
    spec: ModelSpec,
    model: nn.Module,
    weights: str,
    view: str,
    probe: str,
    config: ExemplarConfig,
    layouts: Mapping[str, Layout],
) -> dict[str, Fingerprint]:
    """Layer → fingerprint of its exemplars.

    A layout is part of it only where it is not the conventional one: tables that were made before layouts were
    established, and are right, stay current.
    """
    identity = {
        "kernel": KERNEL_VERSION,
        "weights": weights,
        "structure": hashlib.sha256(repr(model).encode()).hexdigest(),
        "view": view,
        "inputs": source_of(spec.inputs) if spec.images is not None else _inputs_digest(spec),
        "hidden": source_of(spec.hidden),
        "prefix_tokens": spec.prefix_tokens,
        "channels_last": spec.channels_last,
        "activations": spec.activations,
        "probe": probe,
        **config.identity(),
        "batch_size": spec.batch(config.batch_size),
    }
    if spec.bands not in (None, 3):  # a model without bands= gets three
        identity["bands"] = spec.bands
    fingerprints = {}
    for layer in spec.layers:
        layout = layouts[layer]
        usual = layout.is_conventional(spec.prefix_tokens, spec.is_channels_last(spec.base(layer)))
        features = {"features": spec.features[layer].digest} if layer in spec.features else {}
        fingerprints[layer] = Fingerprint.of(
            {**identity, "layer": layer} | ({} if usual else {"layout": layout.identity()}) | features
        )
    return fingerprints


def _inputs_digest(spec: ModelSpec) -> str:
    """Digest of the output of a model's input function for one fixed view."""
    height, width, bands = spec.view_shape
    view = (torch.arange(height * width * bands, dtype=torch.int64) * 7919 % 256).to(torch.uint8)
    prepared = spec.prepare(view.view(1, height, width, bands))
    if isinstance(prepared, Mapping):
        prepared = [prepared[name] for name in sorted(prepared)]
    tensors = [prepared] if isinstance(prepared, torch.Tensor) else prepared
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def pooled_fingerprint(exemplars: Fingerprint) -> Fingerprint:
    """Fingerprint of a layer's pooled activations: the inputs of its exemplars on which activations depend."""
    inputs = {name: digest for name, digest in exemplars.inputs.items() if name not in AFTER_ACTIVATIONS}
    return _of_inputs({**inputs, "pooling": config_hash({"pooling": POOLED_VERSION})[:8]})


def settled_model(
    storage: Storage, ref: references.ModelRef, source: Probe, probe: str, config: ExemplarConfig
) -> DescribedModel:
    """Describes a model; a fingerprint includes the layer's output if that has changed since the table was made.

    Neither weights nor modules say what a ``forward`` does between them. Tables therefore carry their layers' outputs
    for fixed inputs. Where a layer's output is another now, it becomes one of the inputs of the fingerprint, so that
    the table and all that was made of it are stale; it stays one for as long as the layer computes the same.

    Args:
        storage: The run directory.
        ref: The model.
        source: The probe.
        probe: Digest of its manifest.
        config: How exemplars are made.

    Raises:
        MilanError: The model cannot be dissected on this probe.
    """
    spec = references.model(ref)
    check_probe(spec, source)
    described = describe_model(spec, source, probe, config)
    fingerprints = dict(described.fingerprints)
    for layer, fingerprint in described.fingerprints.items():
        try:
            stored = storage.metadata(EXEMPLARS, model=ref.name, layer=layer) or {}
        except DamagedTable:  # counts as missing, which why() says
            continue
        before, now = stored.get(COMPUTES), described.computes.get(layer)
        if before is None or now is None:  # made by an earlier version
            continue
        inputs = inputs_of(stored)
        computes = inputs.pop(COMPUTES, None)
        if inputs != fingerprint.inputs:  # stale anyway, for a reason that has a name
            continue
        if not same(before, now):
            computes = config_hash({COMPUTES: now})[:8]
            say(f"layer {layer!r} of {ref.name} computes something else than when its exemplars were made: made anew")
        if computes is not None:
            fingerprints[layer] = _of_inputs({**fingerprint.inputs, COMPUTES: computes})
    return replace(described, fingerprints=fingerprints)


def _of_inputs(inputs: dict[str, str]) -> Fingerprint:
    """The fingerprint of inputs that are digests already."""
    return Fingerprint(config_hash(inputs), inputs, config_hash(inputs))


def why_exemplars(storage: Storage, fingerprint: Fingerprint, model: str, layer: str) -> str | None:
    """Why a layer's exemplars have to be made; None when they and their levels are current."""
    keys = {"model": model, "layer": layer}
    return storage.why(EXEMPLARS, fingerprint, **keys) or storage.why(LEVELS, fingerprint, **keys)
