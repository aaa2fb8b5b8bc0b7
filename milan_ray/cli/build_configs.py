"""From parsed arguments to the records that pipelines take."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
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
    from milan_ray.models.layouts import Reading
    from milan_ray.stages.captioners import EncoderRef
    from milan_ray.storage import Storage


def open_storage(args: argparse.Namespace) -> Storage:
    """The run directory that ``--storage`` or the environment names."""
    from milan_ray.storage import Storage

    if args.storage is None and runtime.in_submitted_job() and "MILAN_RESULTS_DIR" not in os.environ:
        raise MilanError("give --storage inside a submitted job: the working directory there is a temporary copy.")
    storage = Storage(absolute("--storage", args.storage or str(results_dir())))
    args.summary.facts["storage"] = storage.root
    return storage


def writable_storage(args: argparse.Namespace) -> Storage:
    """The same for a job that will write there, which fails early where it cannot; a dry run does not even try."""
    storage = open_storage(args)
    if not args.dry_run:
        storage.check_writable()
    return storage


def opened(args: argparse.Namespace, runs: bool = True) -> tuple[Storage, list[ModelRef], ProbeRef]:
    """What a job on models and images begins with: the run directory, the models, the images.

    Args:
        args: The options.
        runs: Whether the models are run, so that their weights have to be there.
    """
    return writable_storage(args), model_refs(args, runs), probe_ref(args)


def bert_score_folder(args: argparse.Namespace) -> str | None:
    """The language model of BERTScore: that of ``--bertscore``, else the installed one; None where there is none."""
    from milan_ray.scoring.text import minilm_directory

    folder = absolute("--bertscore", args.bertscore) if args.bertscore else minilm_directory()
    return None if folder is None else str(folder)


def absolute(option: str, path: str) -> str:
    """A path as every process of the job can use it: absolute, or the URI it is.

    Raises:
        MilanError: It is relative, inside a submitted job.
    """
    if "://" in path:
        return path
    if runtime.in_submitted_job() and not Path(path).expanduser().is_absolute():
        raise MilanError(
            f"{option} must be an absolute path or a URI inside a submitted job (got {path}): "
            "the working directory there is a temporary copy."
        )
    return str(Path(path).expanduser().absolute())


def image_text_ref(args: argparse.Namespace) -> ImageTextRef:
    """The model of images and texts that ``--clip`` names: a folder, one in $MILAN_MODELS_DIR, or a registered one.

    Raises:
        MilanError: There is none.
    """
    from milan_ray.models.image_text import DEFAULT, ImageTextRef, find_image_text, is_registered
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    name = args.clip or DEFAULT
    if not is_registered(name) and Path(name).parent != Path("."):
        name = absolute("--clip", name)
    return ImageTextRef(find_image_text(name))


def read_text(option: str, path: str, form: str = "a YAML file") -> str:
    """A text file, local or on an object store."""
    from milan_ray.storage import Storage

    folder, _, name = absolute(option, path).rpartition("/")
    try:
        return decode_text(Storage(folder or "/").get(name))
    except (OSError, UnicodeDecodeError) as error:
        raise MilanError(f"cannot read {option} {path} ({error}); give {form}.") from error


def resources_of(args: argparse.Namespace) -> Resources:
    """The cluster options as a record."""
    return Resources(args.address, args.actors, args.cpus_per_actor, args.gpus_per_actor, args.device)


def model_refs(args: argparse.Namespace, runs: bool = True) -> list[ModelRef]:
    """The models asked for, patterns resolved; one that fails alone is left to the first stage to report.

    Args:
        args: The options.
        runs: Whether the models are run, so that their weights have to be there.
    """
    from milan_ray.engine.references import ModelRef
    from milan_ray.models.registry import RANDOM, get_model, match_models
    from milan_ray.models.resolve import resolve_model
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    names = list(dict.fromkeys(name for pattern in args.model for name in match_models(pattern)))
    if args.weights is not None:
        if len(names) > 1:
            raise MilanError("--weights names the weights of one model; give a single --model with it.")
        if args.weights != RANDOM and args.weights not in get_model(names[0]).published:
            args.weights = absolute("--weights", args.weights)
    found, absent = [], None
    for name in names:
        weights = args.weights if runs else RANDOM
        try:
            weights = resolve_model(name, weights, args.layers, download=args.download).weights
        except WouldDownload as error:  # a dry run names all of them
            absent = error
        except MilanError as error:
            if len(names) == 1:
                raise
            say(f"{name}: {error}", level="warning")  # the first stage finds the same, and goes on with the others
        layers, plugins = tuple(args.layers), tuple(args.plugin)
        found.append(ModelRef(name, weights, layers, plugins, args.activations, reading_of(args)))
    if absent is not None:
        raise absent
    return found


def reading_of(args: argparse.Namespace) -> Reading:
    """What the user says of the layers' axes."""
    from milan_ray.models.layouts import Reading

    return Reading(args.batch_axis, args.units_axis, args.layer_grid, args.prefix_tokens)


def probe_ref(args: argparse.Namespace) -> ProbeRef:
    """Where probe images come from."""
    from milan_ray.engine.references import ProbeRef
    from milan_ray.plugins import load_plugins
    from milan_ray.probe.registry import probe_names

    load_plugins(args.plugin)
    sources = []
    for source in args.probe:
        sources.append(source if source in probe_names() else absolute("--probe", source))
    labels = None if args.labels is None else absolute("--labels", args.labels)
    legend, network = getattr(args, "legend", None), getattr(args, "segmentation", None)
    if network is not None and Path(network).parent != Path("."):
        network = absolute("--segmentation", network)
    legend = legend and absolute("--legend", legend)
    columns = args.image_column, args.label_column
    return ProbeRef(tuple(sources), labels, tuple(args.plugin), legend, network, *columns)


def exemplar_config(args: argparse.Namespace) -> ExemplarConfig:
    """The exemplar options as a record."""
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
    """The captioner as workers will find it: a name in the storage, or an absolute path."""
    from milan_ray.stages.captioners import find_milan, has_captioner

    if args.milan is not None:
        return find_milan(args.milan)
    if has_captioner(storage, args.decoder) or not Path(args.decoder).expanduser().exists():
        return str(args.decoder)
    return absolute("--decoder", args.decoder)


def encoder_ref(
    args: argparse.Namespace, name: str, storage: Storage | None = None, decoder: str | None = None
) -> EncoderRef:
    """A captioner's encoder, with the weights given or its own."""
    from milan_ray.stages.captioners import EncoderRef

    weights = None if args.encoder_weights is None else absolute("--encoder-weights", args.encoder_weights)
    return EncoderRef(name, weights, storage, decoder, tuple(args.plugin), args.download)


def annotated_layers(storage: Storage, source: str, models: Sequence[str] | None) -> dict[str, list[str]]:
    """Model → layers with annotations of a source.

    Raises:
        MilanError: There are none.
    """
    from milan_ray.schema import ANNOTATIONS

    found: dict[str, list[str]] = {}
    for keys in storage.partitions(ANNOTATIONS, source=source):
        if not models or keys["model"] in models:
            found.setdefault(keys["model"], []).append(keys["layer"])
    if not found:
        raise MilanError(f"no annotations of source {source!r} for these models in {storage.root}.")
    return found
