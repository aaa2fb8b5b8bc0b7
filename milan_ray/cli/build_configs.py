"""Converts parsed arguments into the configurations of pipelines."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray import runtime
from milan_ray.config import Arithmetic, ExemplarConfig, Resources, results_dir
from milan_ray.errors import MilanError
from milan_ray.hub import WouldDownload
from milan_ray.progress import say
from milan_ray.textfiles import decode_text

if TYPE_CHECKING:
    from milan_ray.engine.references import ModelRef, ProbeRef
    from milan_ray.models.image_text import ImageTextRef
    from milan_ray.models.registry import ModelSpec
    from milan_ray.stages.captioners import EncoderRef
    from milan_ray.storage import Storage


def open_storage(args: argparse.Namespace) -> Storage:
    """Opens the run directory given by ``--storage`` or the environment."""
    from milan_ray.storage import Storage

    if args.storage is None and runtime.in_submitted_job() and "MILAN_RESULTS_DIR" not in os.environ:
        raise MilanError("give --storage inside a submitted job: the working directory there is a temporary copy.")
    storage = Storage(absolute("--storage", args.storage or str(results_dir())))
    args.summary.facts["storage"] = storage.root
    return storage


def writable_storage(args: argparse.Namespace) -> Storage:
    """Opens the run directory of a job that writes to it; fails early if it is not writable, except in a dry run."""
    storage = open_storage(args)
    if not args.dry_run:
        storage.check_writable()
    return storage


def opened(args: argparse.Namespace, runs: bool = True) -> tuple[Storage, list[ModelRef], ProbeRef]:
    """Resolves the inputs of a job on models and images: the run directory, the models, the images.

    Args:
        args: The options.
        runs: Whether the models are run, so that their weights are required.
    """
    return writable_storage(args), model_refs(args, runs), probe_ref(args)


def bert_score_folder(args: argparse.Namespace) -> str | None:
    """Returns the folder of BERTScore's language model: ``--bertscore``, or else the installed one, or None."""
    from milan_ray.scoring.text import minilm_directory

    folder = absolute("--bertscore", args.bertscore) if args.bertscore else minilm_directory()
    return None if folder is None else str(folder)


def absolute(option: str, path: str) -> str:
    """Converts a path to a form that every process of the job can use: an absolute path, or an unchanged URI.

    Raises:
        MilanError: The path is relative, and this is a submitted job.
    """
    if "://" in path:
        return path
    if runtime.in_submitted_job() and not Path(path).expanduser().is_absolute():
        raise MilanError(
            f"{option} must be an absolute path or a URI inside a submitted job (got {path}): "
            "the working directory there is a temporary copy."
        )
    return str(Path(path).expanduser().absolute())


def image_text_ref(args: argparse.Namespace, option: str = "--clip") -> ImageTextRef:
    """Finds the image-text model of an option: a folder, a folder in $MILAN_MODELS_DIR, or a registered model.

    Args:
        args: The options.
        option: The one that names it.

    Raises:
        MilanError: There is no such model.
    """
    from milan_ray.models.image_text import DEFAULT, ImageTextRef, find_image_text, is_registered
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    name = getattr(args, option.removeprefix("--")) or DEFAULT
    if not is_registered(name) and Path(name).parent != Path("."):
        name = absolute(option, name)
    return ImageTextRef(find_image_text(name))


def read_text(option: str, path: str, form: str = "a YAML file") -> str:
    """Reads a text file, local or in an object store."""
    from milan_ray.storage import Storage

    folder, _, name = absolute(option, path).rpartition("/")
    try:
        return decode_text(Storage(folder or "/").get(name))
    except (OSError, UnicodeDecodeError) as error:
        raise MilanError(f"cannot read {option} {path} ({error}); give {form}.") from error


def resources_of(args: argparse.Namespace) -> Resources:
    """Converts the cluster options to :class:`Resources`."""
    return Resources(args.address, args.actors, args.cpus_per_actor, args.gpus_per_actor, args.device)


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[Resources]:
    """Connects to the cluster of the options, and provides the part of it that the job may use."""
    from milan_ray.engine.cluster import connected

    resources = resources_of(args)
    with connected(resources):
        yield resources


def model_refs(args: argparse.Namespace, runs: bool = True) -> list[ModelRef]:
    """Resolves the requested models and patterns. If one of several models fails, the first stage reports it.

    Args:
        args: The options.
        runs: Whether the models are run, so that their weights are required.
    """
    from milan_ray.models.registry import RANDOM, get_model

    names = model_names(args)
    if args.weights is not None:
        if len(names) > 1:
            raise MilanError("--weights names the weights of one model; give a single --model with it.")
        if args.weights != RANDOM and args.weights not in get_model(names[0]).published:
            args.weights = absolute("--weights", args.weights)
    refs, absent = [], None
    for name in names:
        weights = args.weights if runs else RANDOM
        try:
            weights = resolved(args, name, weights, runs).weights
        except WouldDownload as error:  # a dry run lists all of them
            absent = error
        except MilanError as error:
            if len(names) == 1:
                raise
            say(f"{name}: {error}", level="warning")  # the first stage fails alike, and continues with the others
        refs.append(model_ref(args, name, weights))
    if absent is not None:
        raise absent
    return refs


def model_names(args: argparse.Namespace) -> list[str]:
    """Lists the registered models that match the patterns of ``--model``."""
    from milan_ray.models.registry import match_models
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    return list(dict.fromkeys(name for pattern in args.model for name in match_models(pattern)))


def resolved(args: argparse.Namespace, name: str, weights: str | None, runs: bool = True) -> ModelSpec:
    """Finds a model with the options on weights, and where it is run, on layers and features."""
    from milan_ray.models.resolve import resolve_model

    layers, features = feature_layers(args) if runs else ((), ())
    return resolve_model(name, weights, layers, features=features, download=args.download)


def model_ref(args: argparse.Namespace, name: str, weights: str | None) -> ModelRef:
    """Converts the options on layers to the reference of a model with some weights."""
    from milan_ray.engine.references import ModelRef
    from milan_ray.models.layouts import Reading

    reading = Reading(args.batch_axis, args.units_axis, args.layer_grid, args.prefix_tokens)
    layers, features = feature_layers(args)
    return ModelRef(name, weights, layers, tuple(args.plugin), args.activations, reading, features)


def feature_layers(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers of ``--layers`` and those of ``--features``, and the files of the latter as every process knows them.

    Raises:
        MilanError: There are several models, or a file cannot be read.
    """
    if not args.features:
        return tuple(args.layers), ()
    if len(model_names(args)) > 1:
        raise MilanError("--features names features of one model; give a single --model with it.")
    from milan_ray.models.features.given import file_features, split_given

    files = []
    for given in args.features:
        layer, path = split_given(given)
        files.append(f"{layer}={absolute('--features', path)}" if layer else absolute("--features", path))
    return tuple(dict.fromkeys([*args.layers, *(file_features(file).path for file in files)])), tuple(files)


def probe_ref(args: argparse.Namespace) -> ProbeRef:
    """Converts the probe options to :class:`ProbeRef`."""
    from milan_ray.engine.references import ProbeRef
    from milan_ray.models.segmentation import is_registered
    from milan_ray.plugins import load_plugins
    from milan_ray.probe.registry import probe_names

    load_plugins(args.plugin)
    sources = []
    for source in args.probe:
        sources.append(source if source in probe_names() else absolute("--probe", source))
    labels = None if args.labels is None else absolute("--labels", args.labels)
    legend, network = getattr(args, "legend", None), getattr(args, "segmentation", None)
    if network is not None and not is_registered(network) and Path(network).parent != Path("."):
        network = absolute("--segmentation", network)
    legend = legend and absolute("--legend", legend)
    columns = args.image_column, args.label_column
    return ProbeRef(tuple(sources), labels, tuple(args.plugin), legend, network, *columns)


def exemplar_config(args: argparse.Namespace) -> ExemplarConfig:
    """Converts the exemplar options to :class:`ExemplarConfig`."""
    return ExemplarConfig(
        k=args.k,
        quantile=args.quantile,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        max_bad=args.max_bad,
        truncate_bytes=args.reference_quirks,
        arithmetic=Arithmetic(args.precision, args.channels_last),
        pooled=args.pooled,
    )


def find_captioner(args: argparse.Namespace, storage: Storage) -> str:
    """Finds the captioner; returns its name in the storage or an absolute path, which are valid on workers too."""
    from milan_ray.stages.captioners import find_milan, has_captioner

    if args.milan is not None:
        return find_milan(args.milan)
    if has_captioner(storage, args.decoder) or not Path(args.decoder).expanduser().exists():
        return str(args.decoder)
    return absolute("--decoder", args.decoder)


def encoder_ref(
    args: argparse.Namespace, name: str, storage: Storage | None = None, decoder: str | None = None
) -> EncoderRef:
    """Resolves a captioner's encoder, with the given weights or its own."""
    from milan_ray.stages.captioners import EncoderRef

    weights = None if args.encoder_weights is None else absolute("--encoder-weights", args.encoder_weights)
    return EncoderRef(name, weights, storage, decoder, tuple(args.plugin), args.download)


def annotated_layers(storage: Storage, source: str, models: Sequence[str] | None) -> dict[str, list[str]]:
    """Finds the annotated layers of a source: model → layers.

    Raises:
        MilanError: There are no annotations.
    """
    from milan_ray.schema import ANNOTATIONS

    layers: dict[str, list[str]] = {}
    for keys in storage.partitions(ANNOTATIONS, source=source):
        if not models or keys["model"] in models:
            layers.setdefault(keys["model"], []).append(keys["layer"])
    if not layers:
        raise MilanError(f"no annotations of source {source!r} for these models in {storage.root}.")
    return layers
