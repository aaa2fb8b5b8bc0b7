"""Folders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from milan_ray.errors import MilanError, explained
from milan_ray.models.features.contents import (
    Config,
    Tensors,
    ask,
    check_k,
    check_normalisation,
    common_weights,
    first,
    gated_weights,
    read_config,
    read_tensors,
    unknown,
    with_bias,
)
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

USES = ("k", "normalisation", "scale")
"""Options that are read."""

_SCALER = "activation_scaler.json"
"""What a checkpoint in the middle of a training has beside it: the scale that its weights do not contain yet."""

_SCALED = "expected_average_only_in"

_LAYOUT = "6.0.0"
"""Version of SAELens whose layout is written; without it, older defaults would be filled in."""

_ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")


def read(folder: Path, options: ReadingOptions) -> Dictionary:
    """Reads a folder of SAELens, of any version since 3.

    Raises:
        MilanError: It is incomplete, damaged, or of a kind that is not read.
    """
    path, config = str(folder), read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, "W_enc")
    weights = common_weights(tensors, config.flag("apply_b_dec_to_input", True))
    for name, size in (("d_in", weights.encoder.shape[1]), ("d_sae", weights.encoder.shape[0])):
        if config.integer(name) not in (None, size):
            raise config.wrong(name, config.integer(name))
    weights = _with_factors(config, tensors, weights)
    name = _normalisation(config, options)
    if name == _SCALED:
        weights, name = _folded(weights, _scale(folder, options)), "none"
    return _built(config, tensors, weights, options, check_normalisation(path, name))


def _built(
    config: Config, tensors: Tensors, weights: Weights, options: ReadingOptions, normalisation: str
) -> Dictionary:
    path, count = tensors.path, len(weights.encoder)
    architecture = config.text("architecture") or "standard"
    # Before version 6, the activation was an entry of its own, and TopK one of its values.
    activation = config.text("activation_fn", "activation_fn_str") or "relu"
    if activation == "topk":
        architecture = "topk"
    elif activation not in ("relu", "tanh-relu"):
        raise unknown(path, "activation", activation, ("relu", "tanh-relu", "topk"))
    if architecture == "gated":
        weights = gated_weights(tensors, weights, "b_gate", "b_mag", "r_mag")
        return Dictionary(weights, "gated", normalisation=normalisation)
    if architecture not in _ARCHITECTURES:
        raise unknown(path, "architecture", architecture, _ARCHITECTURES)
    weights = with_bias(tensors, weights)
    if architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        if config.flag("rescale_acts_by_decoder_norm", False):
            weights = _unit_decoder(weights)
        if architecture == "topk":
            k = first(options.k, config.integer("k"), config.inner("activation_fn_kwargs").integer("k"))
            return Dictionary(weights, "topk", check_k(path, k, count), normalisation)
        threshold = torch.full((count,), tensors.number("topk_threshold"))
        return Dictionary(replace(weights, threshold=threshold), "threshold", normalisation=normalisation)
    if architecture == "jumprelu":
        if "log_threshold" in tensors:
            threshold = tensors.tensor("log_threshold", count).exp()
        else:
            threshold = tensors.tensor("threshold", count)
        return Dictionary(replace(weights, threshold=threshold), "threshold", normalisation=normalisation)
    return Dictionary(weights, activation, normalisation=normalisation)


def _normalisation(config: Config, options: ReadingOptions) -> str:
    if options.normalisation is not None:
        return options.normalisation
    value = config.entries.get("normalize_activations")
    if type(value) is bool:  # the first versions knew one normalisation
        return _SCALED if value else "none"
    return config.text("normalize_activations") or "none"


def _scale(folder: Path, options: ReadingOptions) -> float:
    scale: object = options.scale
    scaler = folder / _SCALER
    if scale is None and scaler.is_file():
        scale = read_config(scaler).entries.get("scaling_factor")
    if scale is None:
        where = "what their activations were multiplied by in training, nor whether the weights contain it"
        raise ask(str(folder), where, "scale", "the factor, √C over the mean norm; 1 where the weights contain it")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise MilanError(f"features {folder} have the scale {scale!r}: give scale, a number above 0.")
    return float(scale)


def _folded(weights: Weights, scale: float) -> Weights:
    """Weights for inputs that are not scaled, of weights for scaled ones."""

    def divided(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias / scale

    return replace(
        weights,
        encoder=weights.encoder * scale,
        decoder=weights.decoder / scale,
        decoder_bias=divided(weights.decoder_bias),
        input_bias=divided(weights.input_bias),
    )


def _unit_decoder(weights: Weights) -> Weights:
    """Moves the norms of the decoder's rows into the encoder: TopK then compares what features add."""
    norms = weights.decoder.norm(dim=1).clamp_min(1e-8)
    assert weights.encoder_bias is not None
    return replace(
        weights,
        encoder=weights.encoder * norms[:, None],
        encoder_bias=weights.encoder_bias * norms,
        decoder=weights.decoder / norms[:, None],
    )


def _with_factors(config: Config, tensors: Tensors, weights: Weights) -> Weights:
    """Moves the factors that fine-tuning gave to codes before they are decoded into the decoder."""
    name = next((name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors), None)
    if name is None:
        return weights
    factors = tensors.tensor(name, len(weights.encoder))
    if bool((factors == 1).all()):
        return weights
    if not config.flag("finetuning_scaling_factor", False):
        raise tensors.problem(f"it has a tensor {name} that {CONFIG} says is not used")
    return replace(weights, decoder=weights.decoder * factors[:, None])


def saelens_files(dictionary: Dictionary, metadata: Mapping[str, object]) -> dict[str, bytes]:
    """A dictionary as the files of a folder that SAELens 6 loads (``SAE.load_from_disk``).

    Args:
        dictionary: The dictionary.
        metadata: What is known of it, such as ``model_name`` and ``hook_name``; values that JSON has.

    Returns:
        Names of the files → their content; the weights come first.

    Raises:
        MilanError: SAELens has no such dictionaries.
    """
    kinds = {"relu": "standard", "topk": "topk", "threshold": "jumprelu", "gated": "gated"}
    biases = dictionary.input_bias, dictionary.decoder_bias
    subtracts = biases[0] is not None
    if dictionary.activation not in kinds:
        raise MilanError(
            f"SAELens has no dictionaries with the activation {dictionary.activation}: only {', '.join(kinds)} can be "
            "written for it."
        )
    if subtracts and (biases[1] is None or not torch.equal(biases[0], biases[1])):  # type: ignore[arg-type]
        raise MilanError("SAELens subtracts what it adds: give a dictionary whose two biases of the layer are equal.")
    config: dict[str, object] = {
        "architecture": kinds[dictionary.activation],
        "d_in": dictionary.width,
        "d_sae": dictionary.count,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": dictionary.normalisation,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _LAYOUT, "sae_lens_training_version": None, **metadata},
    }
    if dictionary.sparse is not None:
        config |= {"k": dictionary.sparse, "rescale_acts_by_decoder_norm": False}
    with explained("the metadata of features cannot be written", "give texts and numbers.", TypeError, ValueError):
        text = json.dumps(config, indent=1, allow_nan=False)
    return {WEIGHTS: save(_state(dictionary)), CONFIG: text.encode()}


def _state(dictionary: Dictionary) -> dict[str, torch.Tensor]:
    """The state dict that SAELens expects, on the CPU."""

    def vector(tensor: torch.Tensor | None, size: int) -> torch.Tensor:
        return torch.zeros(size) if tensor is None else tensor

    count, width = dictionary.count, dictionary.width
    state = {
        "W_enc": dictionary.encoder.T,
        "W_dec": dictionary.directions,
        "b_dec": vector(dictionary.decoder_bias, width),
    }
    bias = vector(dictionary.encoder_bias, count)
    if dictionary.activation == "gated":
        gates = {"b_gate": dictionary.gate_bias, "r_mag": dictionary.log_gain}
        state |= {name: vector(tensor, count) for name, tensor in gates.items()} | {"b_mag": bias}
    else:
        state["b_enc"] = bias
    if dictionary.threshold is not None:
        state["threshold"] = dictionary.threshold
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def write_saelens(dictionary: Dictionary, folder: str | Path, metadata: Mapping[str, object]) -> None:
    """Writes a folder that SAELens 6 loads; see :func:`saelens_files`.

    Raises:
        MilanError: SAELens has no such dictionaries, or the folder cannot be written.
    """
    files = saelens_files(dictionary, metadata)
    with explained(f"cannot write features to {folder}", "give a folder that can be written to.", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
