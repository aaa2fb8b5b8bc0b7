"""The command line: ``milan-ray VERB …``, and ``python -m jobs.VERB …`` for ``ray job submit``.

Torch and Ray are imported by the verb that needs them, after :func:`milan_ray.runtime.prepare` has settled the
environment they read.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray import runtime
from milan_ray.benchmarks import BENCHMARKS
from milan_ray.config import FLOAT32, Arithmetic, ExemplarConfig, Resources, TrainingConfig, results_dir
from milan_ray.errors import MilanError
from milan_ray.progress import LOG, say

if TYPE_CHECKING:
    from milan_ray.labelers.clip import Clip
    from milan_ray.pipelines.captioners import EncoderRequest
    from milan_ray.pipelines.describe import Search
    from milan_ray.pipelines.label import LabelConfig
    from milan_ray.pipelines.plan import Plan
    from milan_ray.pipelines.requests import ModelRequest, ProbeRequest
    from milan_ray.storage import Storage

EXEMPLARS = ExemplarConfig()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], ()):
            return action.help
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def share(text: str) -> float:
    """An argument between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def gib(text: str) -> int:
    """An argument in GiB, as bytes."""
    return int(float(text) * 2**30)


def units(text: str) -> tuple[int, ...]:
    """An argument that selects units: numbers and ranges."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--log", choices=("text", "json"), help="form of the log (default: $MILAN_LOG, else text)")


def _storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        default=None,
        help="run directory of all tables: a path, s3://…, gs://… (default: $MILAN_RESULTS_DIR, else ./results)",
    )


def _download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch published weights that are absent")


def _quirks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference-quirks", action="store_true", help="reproduce the reference's defects too (ARCHITECTURE.md)"
    )


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be made and why, and make nothing")


def _units(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--units", type=units, default=(), metavar="1,5,7-12", help="describe only these units of every layer"
    )


def _plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="importable module or .py file that registers models or probes; may be repeated",
    )


def _resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--address", help="Ray cluster to join (default: $RAY_ADDRESS, else a local one of our own)")
    group.add_argument("--actors", type=positive, help="most actors of a pool (default: one per GPU, else per CPU)")
    group.add_argument("--cpus-per-actor", type=positive, default=1, help="CPUs and torch threads of each actor")
    group.add_argument("--gpus-per-actor", type=float, help="GPUs of each actor, fractions allowed (default: 1 if any)")
    group.add_argument("--device", default="auto", help="where models run: auto, cpu or cuda")


def _models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="registered models, or patterns ('resnet*/imagenet'); see jobs.models",
    )
    which.add_argument(
        "--zoo",
        type=lambda text: text.split(","),
        dest="model",
        metavar="NAMES",
        help="the same as one word: 'imagenet,imagenet-blurred' is every …/imagenet and …/imagenet-blurred",
    )
    group.add_argument(
        "--weights",
        metavar="WEIGHTS",
        help="weights of the one model given: a file, a URL, the name of published ones (IMAGENET1K_V2) or 'random'",
    )
    group.add_argument("--layers", nargs="+", default=[], metavar="PATH", help="layers (default: the model's own list)")
    group.add_argument(
        "--activations",
        choices=("seen", "pre", "post"),
        default="seen",
        help="of a layer with an activation function behind it: what the reference sees (values after it where it "
        "works in place, else before), always before, or always after",
    )


def _probe(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("probe images")
    group.add_argument(
        "--probe",
        nargs="+",
        required=required,
        metavar="SOURCE",
        help="folders, URIs or a registered probe; of a generator, its latents"
        + ("" if required else " (default: describe the exemplars that the storage holds)"),
    )
    group.add_argument("--labels", metavar="FILE", help="CSV of file names and classes, for folders without classes")
    group.add_argument(
        "--max-bad", type=share, default=EXEMPLARS.max_bad, help="share of unreadable images above which to fail"
    )


def _exemplar_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("exemplars")
    group.add_argument("--k", type=positive, default=EXEMPLARS.k, help="exemplars per unit, images")
    group.add_argument("--quantile", type=share, default=EXEMPLARS.quantile, help="activation quantile of the level η")
    group.add_argument("--batch-size", type=positive, default=EXEMPLARS.batch_size, help="images per forward pass")
    group.add_argument("--shard-size", type=positive, help="images per unit of work (default: at most 256)")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default=FLOAT32.precision,
        help="how models compute; below float32 activations are rounded, so that images may tie and masks change",
    )
    group.add_argument(
        "--channels-last",
        action="store_true",
        help="keep channels last in memory: faster convolutions, equal within float error; not every model allows it",
    )
    group.add_argument(
        "--pooled",
        action="store_true",
        help="also store every unit's maximum and mean on every image (table pooled), which some labelers read",
    )


def _report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")


def _captioner_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("captioner")
    captioner = group.add_mutually_exclusive_group(required=required)
    captioner.add_argument("--decoder", help="captioner: a name trained into the storage, its folder, or a .pth file")
    captioner.add_argument(
        "--milan",
        metavar="KEY",
        help="published captioner: base, cls, gen, imagenet, places365, alexnet, resnet152, biggan, "
        "not-alexnet-imagenet, …; looked for in $MILAN_MODELS_DIR, else downloaded there",
    )
    group.add_argument(
        "--encoder-weights", metavar="FILE", help="weights of the captioner's encoder, if it brings none"
    )


def _clip_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("re-ranking by a model of images and texts, as labeler milan+clip")
    group.add_argument(
        "--clip",
        nargs="?",
        const="",
        metavar="MODEL",
        help="re-rank the candidates of a wide beam by CLIP or SigLIP: a folder, or the name of one in "
        "$MILAN_MODELS_DIR (alone, or with --milan KEY+clip: clip-vit-base-patch32)",
    )
    group.add_argument(
        "--clip-z", type=share, default=0.5, metavar="Z", help="weight of whole images against their masked regions"
    )
    group.add_argument(
        "--clip-beam-size", type=positive, metavar="N", help="candidates per unit (default: 1000, or the vocabulary)"
    )
    group.add_argument(
        "--clip-lam", type=float, default=0.5, metavar="LAM", help="λ that the search for candidates subtracts with"
    )


def _search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("descriptions")
    group.add_argument(
        "--setting", metavar="FILE", help="λ, beam size and length as jobs.tune chose them; the options below win"
    )
    group.add_argument(
        "--lam", type=float, help="λ of log p(d|E) − λ·log p(d) (default: the captioner's own, as a rule 0.2)"
    )
    group.add_argument("--beam-size", type=positive, help="width of the beam (default: the captioner's own, 50)")
    group.add_argument(
        "--length", type=positive, help="most tokens, <stop> included (default: the captioner's own, 15)"
    )


# -- from arguments to records ----------------------------------------------------------------------------------


def _open_storage(args: argparse.Namespace) -> Storage:
    from milan_ray.storage import Storage

    if args.storage is None and runtime.in_submitted_job() and "MILAN_RESULTS_DIR" not in os.environ:
        raise MilanError("give --storage inside a submitted job: the working directory there is a temporary copy.")
    return Storage(_absolute("--storage", args.storage or str(results_dir())))


def _absolute(option: str, path: str) -> str:
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


def _resources_of(args: argparse.Namespace) -> Resources:
    return Resources(args.address, args.actors, args.cpus_per_actor, args.gpus_per_actor, args.device)


def _model_requests(args: argparse.Namespace) -> list[ModelRequest]:
    from milan_ray.models.registry import RANDOM, get_model, match_models
    from milan_ray.models.resolve import resolve_model
    from milan_ray.pipelines.requests import ModelRequest
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    names = list(dict.fromkeys(name for pattern in args.model for name in match_models(pattern)))
    if args.weights is not None:
        if len(names) > 1:
            raise MilanError("--weights names the weights of one model; give a single --model with it.")
        if args.weights != RANDOM and args.weights not in get_model(names[0]).published:
            args.weights = _absolute("--weights", args.weights)
    found = []
    for name in names:
        weights = args.weights
        try:
            weights = resolve_model(name, weights, args.layers, download=args.download).weights
        except MilanError as error:
            if len(names) == 1:
                raise
            say(f"{name}: {error}")  # the first stage finds the same, and goes on with the others
        found.append(ModelRequest(name, weights, tuple(args.layers), tuple(args.plugin), args.activations))
    return found


def _probe_request(args: argparse.Namespace) -> ProbeRequest:
    from milan_ray.pipelines.requests import ProbeRequest
    from milan_ray.plugins import load_plugins
    from milan_ray.probe.registry import probe_names

    load_plugins(args.plugin)
    sources = []
    for source in args.probe:
        sources.append(source if source in probe_names() else _absolute("--probe", source))
    labels = None if args.labels is None else _absolute("--labels", args.labels)
    legend = getattr(args, "legend", None)
    return ProbeRequest(tuple(sources), labels, tuple(args.plugin), legend and _absolute("--legend", legend))


def _exemplar_config(args: argparse.Namespace) -> ExemplarConfig:
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


def _write_report(
    args: argparse.Namespace,
    storage: Storage,
    models: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    from milan_ray.report import write_report

    if args.no_report:
        return
    if args.report is None and not storage.is_local:
        say("report: skipped; give --report DIR to write one beside a remote storage")
        return
    target = Path(_absolute("--report", args.report)) if args.report else Path(storage.root) / "report"
    index = write_report(storage, target, models=models, labelers=_labelers(storage, models), notes=notes)
    say(f"report: {index}")


def _labelers(storage: Storage, models: Sequence[str] | None) -> list[str] | None:
    """The labelers of some models (or all) in the order that a report shows them: MILAN first; None without any."""
    from milan_ray.schema import DESCRIPTIONS

    described = storage.partitions(DESCRIPTIONS)
    found = {keys["labeler"] for keys in described if models is None or keys["model"] in models}
    return sorted(found, key=lambda labeler: (labeler != "milan", labeler)) or None


# -- verbs ------------------------------------------------------------------------------------------------------


def _add_exemplars(parser: argparse.ArgumentParser) -> None:
    _probe(parser, required=True)
    adders = (
        _models, _exemplar_options, _download, _quirks, _storage, _report_option, _plugins, _resources, _dry_run,
        _common
    )  # fmt: skip
    for add in adders:
        add(parser)


def _exemplars(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.pipelines.plan import plan_exemplars

    started = time.monotonic()
    storage, probe, models = _open_storage(args), _probe_request(args), _model_requests(args)
    resources, config = _resources_of(args), _exemplar_config(args)
    if args.dry_run:
        return _show(plan_exemplars(storage, models, probe, config)[0])
    storage.check_writable()
    with connected(resources):
        done = run_exemplars(storage, models, probe, config, resources)
    _write_report(args, storage, list(done.models))
    return _close("exemplars", storage, done.models, done.failed, started)


def _add_describe(parser: argparse.ArgumentParser) -> None:
    _probe(parser, required=False)
    adders = (
        _models, _exemplar_options, _captioner_options, _clip_options, _search_options, _units, _download, _quirks,
        _storage, _report_option, _plugins, _resources, _dry_run, _common
    )  # fmt: skip
    for add in adders:
        add(parser)


def _describe(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.annotations_export import exemplar_layers
    from milan_ray.pipelines.captioners import about_captioner, load_captioner
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.describe import run_descriptions
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.pipelines.plan import (
        plan_descriptions,
        plan_encodings,
        plan_exemplars,
        plan_present,
        plan_reranking,
    )
    from milan_ray.pipelines.rerank import run_reranking

    started = time.monotonic()
    storage, resources = _open_storage(args), _resources_of(args)
    clip = _clip(args)
    decoder = _decoder(args, storage)
    encoder = _encoder(args, load_captioner(storage, decoder).encoder_name, storage, decoder)
    encoder.load()
    search = _search(args, decoder)
    present: dict[str, tuple[str, ...]] = {}
    failed: dict[str, str] = {}
    if args.probe is None:
        present = {name: tuple(exemplar_layers(storage, name, args.layers or None)) for name in args.model}
    else:
        dissection = storage, _model_requests(args), _probe_request(args), _exemplar_config(args)
    if args.dry_run:
        plan, layers = plan_present(storage, present) if args.probe is None else plan_exemplars(*dissection)
        encodings = plan_encodings(storage, plan, layers, encoder, args.units)
        plan_descriptions(storage, plan, encodings, search, args.units)
        if clip is not None:
            plan_reranking(storage, plan, layers, encodings, search, clip, args.units)
        return _show(plan)
    with connected(resources):
        if args.probe is not None:
            done = run_exemplars(*dissection, resources)
            present, failed = done.models, done.failed
        run_encodings(storage, present, encoder, resources, args.units)
        run_descriptions(storage, present, search, resources, args.units)
        if clip is not None:
            run_reranking(storage, present, search, clip, resources, args.units)
    about = about_captioner(storage, decoder)
    _write_report(args, storage, list(present), {"About the descriptions": about} if about else None)
    return _close("descriptions", storage, present, failed, started)


def _add_label(parser: argparse.ArgumentParser) -> None:
    _probe(parser, required=True)
    group = parser.add_argument_group("labels from concept maps")
    group.add_argument(
        "--labeler",
        type=lambda text: text.split(","),
        default="netdissect,compexp",
        metavar="NAMES",
        help="netdissect (one concept per unit), compexp (a formula of concepts), or both",
    )
    group.add_argument(
        "--legend", metavar="FILE", help="what the numbers in a folder's label maps mean: lines of `number name`"
    )
    group.add_argument(
        "--grid", type=positive, metavar="N", help="count on N × N positions (default: about 56, or a small view's own)"
    )
    group.add_argument("--formula-beam-size", type=positive, default=5, metavar="N", help="formulas kept per round")
    group.add_argument("--formula-length", type=positive, default=3, metavar="N", help="concepts in a formula at most")
    adders = (
        _models, _exemplar_options, _units, _download, _quirks, _storage, _report_option, _plugins, _resources,
        _dry_run, _common
    )  # fmt: skip
    for add in adders:
        add(parser)


def _label(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.pipelines.label import run_labels
    from milan_ray.pipelines.plan import plan_exemplars, plan_labels

    started = time.monotonic()
    how = _label_config(args)
    storage, probe, models = _open_storage(args), _probe_request(args), _model_requests(args)
    resources, config = _resources_of(args), _exemplar_config(args)
    if args.dry_run:
        plan, layers = plan_exemplars(storage, models, probe, config)
        plan_labels(storage, plan, layers, models, how, args.units)
        return _show(plan)
    storage.check_writable()
    with connected(resources):
        done = run_exemplars(storage, models, probe, config, resources)
        failed = done.failed | run_labels(storage, done, models, probe, config, how, resources, args.units)
    labelled = {name: layers for name, layers in done.models.items() if name not in failed}
    _write_report(args, storage, list(done.models))
    return _close("labels", storage, labelled, failed, started)


def _label_config(args: argparse.Namespace) -> LabelConfig:
    from milan_ray.errors import unknown_name
    from milan_ray.labelers.compexp import CompExp
    from milan_ray.labelers.netdissect import NetDissect
    from milan_ray.pipelines.label import ConceptLabeler, LabelConfig

    composed = CompExp(args.formula_beam_size, args.formula_length)
    known: dict[str, ConceptLabeler] = {NetDissect.name: NetDissect(), CompExp.name: composed}
    for name in args.labeler:
        if name not in known:
            raise unknown_name("labeler", name, known, f"--labeler takes {' or '.join(known)}.")
    chosen = tuple(labeler for name, labeler in known.items() if name in args.labeler)
    return LabelConfig(chosen, args.grid and (args.grid, args.grid))


def _clip(args: argparse.Namespace) -> Clip | None:
    """How to re-rank, where ``--clip`` asks for it or a captioner's name ending in ``+clip``, which is taken off."""
    from milan_ray.labelers.clip import Clip
    from milan_ray.models.image_text import DEFAULT, find_image_text
    from milan_ray.pipelines.captioners import RERANKED

    for option in ("milan", "decoder"):
        name = getattr(args, option)
        if name is not None and name.endswith(RERANKED) and not Path(name).exists():
            setattr(args, option, name.removesuffix(RERANKED))
            args.clip = args.clip or ""
    if args.clip is None:
        return None
    folder = _absolute("--clip", args.clip) if Path(args.clip).parent != Path(".") else args.clip
    return Clip(find_image_text(folder or DEFAULT), args.clip_z, args.clip_beam_size, args.clip_lam)


def _encoder(
    args: argparse.Namespace, name: str, storage: Storage | None = None, decoder: str | None = None
) -> EncoderRequest:
    from milan_ray.pipelines.captioners import EncoderRequest

    weights = None if args.encoder_weights is None else _absolute("--encoder-weights", args.encoder_weights)
    return EncoderRequest(name, weights, storage, decoder, tuple(args.plugin), args.download)


def _search(args: argparse.Namespace, decoder: str) -> Search:
    """How to search: the options given, else what the setting says, else the captioner's own."""
    from milan_ray.captioner.quirks import NO_QUIRKS, REFERENCE
    from milan_ray.experiments.tuning import read_setting
    from milan_ray.pipelines.describe import Search

    search = Search(decoder, args.beam_size, args.length, args.lam, REFERENCE if args.reference_quirks else NO_QUIRKS)
    if args.setting is None:
        return search
    setting = read_setting(_text("--setting", args.setting), args.setting)
    return replace(search, **{name: value for name, value in asdict(setting).items() if getattr(args, name) is None})


def _text(option: str, path: str) -> str:
    """A text file, local or on an object store."""
    from milan_ray.storage import Storage

    folder, _, name = _absolute(option, path).rpartition("/")
    try:
        return Storage(folder or "/").get(name).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise MilanError(f"cannot read {option} {path} ({error}); give a YAML file.") from error


def _show(plan: Plan) -> int:
    print(plan.text())
    return 1 if plan.failed else 0


def _close(
    stage: str, storage: Storage, done: Mapping[str, Sequence[str]], failed: Mapping[str, str], started: float
) -> int:
    """Says what is there now, where, how long it took, and what is not there and why; returns the exit status."""
    seconds = time.monotonic() - started
    say(f"{stage}: {sum(map(len, done.values()))} layers of {len(done)} models in {seconds:.0f} s, in {storage.root}")
    for name, reason in failed.items():
        say(f"skipped {name}: {reason}")
    return 1 if failed else 0


def _decoder(args: argparse.Namespace, storage: Storage) -> str:
    """The captioner as workers will find it: a name in the storage, or an absolute path."""
    from milan_ray.pipelines.captioners import find_milan, has_captioner

    if args.milan is not None:
        return find_milan(args.milan)
    if has_captioner(storage, args.decoder) or not Path(args.decoder).expanduser().exists():
        return args.decoder
    return _absolute("--decoder", args.decoder)


def _add_train(parser: argparse.ArgumentParser) -> None:
    config = TrainingConfig()
    parser.add_argument("--name", help="name of the captioner in the storage (default: the group's)")
    parser.add_argument(
        "--annotations", default="milannotations", metavar="SOURCE", help="source of the annotations to train on"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--group", "--groups", nargs="+", metavar="GROUP",
        help="a captioner each: base, cls, gen, imagenet, places365, alexnet, resnet152, biggan, not-MODEL-DATASET, "
        "an annotated model, NAME=MODEL,MODEL for your own, or all",
    )  # fmt: skip
    which.add_argument("--model", nargs="+", metavar="NAME", help="only annotated units of these models (default: all)")
    parser.add_argument(
        "--setting", metavar="FILE",
        help="learning rate, sizes, dropout, regulariser and encoder of the decoder, as jobs.tune chose them; the "
        "language model keeps the options below",
    )  # fmt: skip
    parser.add_argument("--encoder", help="image encoder (default: the setting's, else resnet101)")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights file of the encoder (default: its own)")
    parser.add_argument("--epochs", type=positive, default=config.max_epochs, help="epochs at most, of each model")
    parser.add_argument("--patience", type=int, default=config.patience, help="epochs without improvement forgiven")
    parser.add_argument("--hold-out", type=share, default=config.hold_out, help="share of units held out to stop early")
    parser.add_argument("--hidden", type=positive, default=512, help="LSTM state, units")
    parser.add_argument("--embedding", type=positive, default=128, help="token embedding, units")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--seed", type=int, default=config.seed, help="of weights, dropout and order")
    parser.add_argument("--workers", type=positive, default=1, help="data-parallel training workers of each captioner")
    parser.add_argument(
        "--memory-limit", type=gib, default="2", metavar="GIB",
        help="features a worker keeps in memory; more are read from disk as needed",
    )  # fmt: skip
    for add in (_download, _quirks, _storage, _plugins, _resources, _dry_run, _common):
        add(parser)


def _train(args: argparse.Namespace) -> int:
    from milan_ray.annotations.groups import training_groups
    from milan_ray.experiments.decoder_search import DecoderSetting, read_decoder_setting
    from milan_ray.pipelines.cluster import connected, gpus_each
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.plan import plan_training
    from milan_ray.pipelines.train import Sizes, TrainingJob, run_trainings

    storage, resources = _open_storage(args), _resources_of(args)
    annotated = _annotated(storage, args.annotations, args.model)
    if args.group:
        groups = training_groups(args.group, annotated)
        if args.name and len(groups) > 1:
            raise MilanError(f"--name is for one captioner, and these are {len(groups)} groups: leave it out.")
        names = {args.name or group: models for group, models in groups.items()}
    elif args.name:
        names = {args.name: tuple(annotated)}
    else:
        raise MilanError("which annotations to train on: give --group, or --name for a captioner of all of them.")
    setting = None
    if args.setting:
        setting = read_decoder_setting(_text("--setting", args.setting), args.setting)
        setting = replace(setting, encoder=args.encoder or setting.encoder)
    encoder = _encoder(args, args.encoder or (setting or DecoderSetting()).encoder)
    config = TrainingConfig(
        max_epochs=args.epochs,
        patience=args.patience,
        hold_out=args.hold_out,
        seed=args.seed,
        bf16=args.bf16,
        keep_last_weights=args.reference_quirks,
    )
    jobs = [
        TrainingJob(
            name,
            args.annotations,
            tuple((model, layer) for model in models for layer in annotated[model]),
            encoder,
            config,
            Sizes(args.embedding, args.hidden),
            args.workers,
            resources.cpus_per_actor,
            threads=resources.threads,
            memory_limit=args.memory_limit,
            decoder=setting,
        )
        for name, models in names.items()
    ]
    if args.dry_run:
        return max(_show(plan_training(storage, job)) for job in jobs)
    with connected(resources):
        wanted = {model: annotated[model] for models in names.values() for model in models}
        run_encodings(storage, wanted, encoder, resources)
        run_trainings(storage, [replace(job, gpus=gpus_each(resources)) for job in jobs])
    return 0


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="what to try: tune_configs/rerank.yaml, …")
    parser.add_argument("--annotations", required=True, metavar="SOURCE", help="source of the annotations that judge")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="only annotated units of these models: best ones that the captioner was not trained on (default: all)",
    )
    parser.add_argument(
        "--bert-model", metavar="DIR", help="language model of BERTScore (default: MiniLM, where it is installed)"
    )
    _captioner_options(parser, required=False)  # decoder.yaml tunes how to train one
    for add in (_download, _storage, _plugins, _resources, _common):
        add(parser)


def _annotated(storage: Storage, source: str, models: Sequence[str] | None) -> dict[str, list[str]]:
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


def _tune(args: argparse.Namespace) -> int:
    from milan_ray.experiments.decoder_search import tunes_decoder
    from milan_ray.experiments.tuning import read_sweep
    from milan_ray.pipelines.captioners import load_captioner
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.tune import TuningJob, run_tuning
    from milan_ray.scoring.text import minilm_directory

    storage, resources = _open_storage(args), _resources_of(args)
    text = _text("--config", args.config)
    if tunes_decoder(text):
        return _tune_decoder(args, storage, resources, text)
    if args.decoder is None and args.milan is None:
        raise MilanError(f"{args.config} tunes how a captioner decodes: give --decoder or --milan.")
    sweep = read_sweep(text, args.config)
    decoder = _decoder(args, storage)
    models = _annotated(storage, args.annotations, args.model)
    layers = tuple((model, layer) for model, paths in models.items() for layer in paths)
    minilm = minilm_directory()
    bert_model = _absolute("--bert-model", args.bert_model or str(minilm)) if args.bert_model or minilm else None
    job = TuningJob(Path(args.config).stem, decoder, args.annotations, layers, sweep, bert_model)
    encoder = _encoder(args, load_captioner(storage, decoder).encoder_name, storage, decoder)
    with connected(resources):
        run_encodings(storage, models, encoder, resources)
        run_tuning(storage, job, resources)
    return 0


def _tune_decoder(args: argparse.Namespace, storage: Storage, resources: Resources, text: str) -> int:
    from milan_ray.experiments.decoder_search import read_decoder_space
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.tune_decoder import DecoderTuningJob, run_decoder_tuning

    if args.decoder or args.milan:
        raise MilanError(f"{args.config} tunes how a decoder is trained: leave out --decoder and --milan.")
    space = read_decoder_space(text, args.config)
    if args.encoder_weights and len(space.encoders) > 1:
        raise MilanError(f"--encoder-weights is for one encoder, and {args.config} has {', '.join(space.encoders)}.")
    models = _annotated(storage, args.annotations, args.model)
    layers = tuple((model, layer) for model, paths in models.items() for layer in paths)
    job = DecoderTuningJob(Path(args.config).stem, args.annotations, layers, space)
    with connected(resources):
        for name in space.encoders:
            run_encodings(storage, models, _encoder(args, name), resources)
        run_decoder_tuning(storage, job, resources)
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generator", action="store_true", help="dissect the world's image generator too (2 minutes)")
    parser.add_argument(
        "--clip", action="store_true", help="re-rank by a small CLIP trained on the world, too (4 minutes)"
    )
    for add in (_storage, _report_option, _resources, _common):
        add(parser)


def _demo(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.captioners import about_captioner
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.demo import DECODER, run_demo, run_generator, summary
    from milan_ray.plugins import load_plugins
    from milan_ray.schema import DESCRIPTIONS

    started = time.monotonic()
    load_plugins()
    if args.storage is None:
        args.storage = str(results_dir() / "demo")
    storage, resources = _open_storage(args), _resources_of(args)
    storage.check_writable()
    say(f"the built-in world, end to end, into {storage.root}")
    with connected(resources):
        scores = run_demo(storage, resources, max(1, (os.cpu_count() or 1) // 2 * 2), args.clip)
        if args.generator:
            run_generator(storage, resources)
    _write_report(args, storage, notes={"About the descriptions": about_captioner(storage, DECODER)})
    layers = storage.partitions(DESCRIPTIONS, labeler="milan")
    units = sum(len(storage.read(DESCRIPTIONS, ["unit"], **keys)) for keys in layers)
    say(f"\n{units} units of {len({keys['model'] for keys in layers})} networks described. Beside what costs nothing:")
    say(summary(scores))
    say(f"tables: {storage.uri('descriptions')}/**/*.parquet, and the others beside it")
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        help="a model whose layers to list, with shapes and unit counts, or a pattern ('*/places365')",
    )
    parser.add_argument("--weights", metavar="WEIGHTS", help="weights of that model: a file, a name or a URL")
    for add in (_plugins, _common):
        add(parser)


def _print_models(names: Sequence[str], families: bool) -> None:
    """Lists models: how many layers are dissected by default, and which published weights lie here."""
    from milan_ray.models.registry import family_names, get_model

    for name in names:
        spec = get_model(name)
        here = [version for version, file in spec.published.items() if file.is_here()]
        state = f"here: {', '.join(here)}" if here else "absent" if spec.published else "its own"
        print(f"{name:40} {len(spec.layers):>3} layers   weights {state}")
    if families:
        for prefix, about in family_names().items():
            print(f"{prefix + '/…':40} {about}")


def _list_models(args: argparse.Namespace) -> int:
    from milan_ray.models.describe import layer_table
    from milan_ray.models.registry import get_model, model_names
    from milan_ray.models.resolve import resolve_model
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    if args.name is None or set(args.name) & set("*?["):
        _print_models(fnmatch.filter(model_names(), args.name or "*"), args.name is None)
        return 0
    spec = resolve_model(args.name, args.weights) if args.weights else get_model(args.name)
    print(f"{'layer':40} {'module':24} {'shape':20} {'units':>6}  default")
    for layer in layer_table(spec):
        shape = "×".join(map(str, layer.shape)) if layer.shape else "-"
        units = layer.units if layer.units is not None else "-"
        print(f"{layer.path:40} {layer.kind:24} {shape:20} {units:>6}  {'*' if layer.default else ''}")
    return 0


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved runs of subject and baseline")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads of both")
    parser.add_argument("--photos", metavar="DIR", help="folder of JPEG photographs (default: generated noise)")
    parser.add_argument("--annotations", metavar="DIR", help="folder of human annotations (default: invented ones)")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that it works; figures mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write machine and figures there")
    _common(parser)


def _benchmark(args: argparse.Namespace) -> int:
    from milan_ray.benchmarks.harness import Options, run_benchmark

    photos, annotations, json = (
        None if path is None else Path(path) for path in (args.photos, args.annotations, args.json)
    )
    run_benchmark(args.name, Options(args.repeats, args.threads, args.short, photos, annotations), json)
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these models")
    parser.set_defaults(no_report=False)
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    for add in (_storage, _common):
        add(parser)


def _report(args: argparse.Namespace) -> int:
    _write_report(args, _open_storage(args), args.model)
    return 0


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    for add in (_storage, _common):
        add(parser)


def _status(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.status import status

    found = status(_open_storage(args))
    print(found.json() if args.json else found.text())
    return 0


def _add_annotations(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=summary, description=summary + ".", formatter_class=_Help)

    sets = "group (base, cls, gen, …), set (alexnet/imagenet, …), folder or zip"
    bring = action("import", "Bring published exemplars and annotations into the storage")
    bring.add_argument(
        "set", metavar="SET", help=f"{sets}; or a CSV (layer, unit, summary) for the exemplars of --model"
    )
    bring.add_argument("--model", help="name of the model in the storage (default: the set's, e.g. alexnet/imagenet)")
    bring.add_argument("--layers", nargs="+", metavar="LAYER", help="only these layers")
    bring.add_argument("--download", action="store_true", help="fetch released sets that are absent")
    bring.add_argument(
        "--annotation-count", type=int, metavar="N",
        help="units with at least N annotations, the first N of each; 0 for all (default: 3 for released sets, else 0)",
    )  # fmt: skip
    merge = action("merge", "Give masks-only sets the images of a local ImageNet or Places folder")
    merge.add_argument("set", metavar="SET", help=sets)
    for one in (bring, merge):
        one.add_argument("--images", nargs="+", default=[], metavar="DIR", help="source images in class folders "
                         "(default: $MILAN_DATA_DIR/imagenet/val, …)")  # fmt: skip
        one.add_argument("--labels", metavar="FILE", help="classes of source images in a flat folder")
        one.add_argument("--reference-quirks", action="store_true", help="squash images as the reference's merge does")
    export = action("export", "Write exemplars and annotations of a model as a published set")
    export.add_argument("model", metavar="MODEL", help="a model with exemplars in the storage")
    export.add_argument("folder", metavar="DIR", help="folder to be made")
    export.add_argument("--layers", nargs="+", metavar="LAYER", help="only these layers")
    clean = action("clean", "Clean raw crowd results into an annotations.csv")
    clean.add_argument("results", metavar="FILE", help="Mechanical Turk's CSV")
    clean.add_argument("out", metavar="FILE", help="annotations.csv to write")
    clean.add_argument(
        "--tables", metavar="JSON", help="prefixes, substrings, suffixes, exact, words, workers: replacements"
    )
    clean.add_argument("--keep-rejected", action="store_true", help="keep what was rejected")
    for one in (bring, export):
        one.add_argument("--source", help="source of the annotations (default: milannotations; export: the only one)")
        _storage(one)
    for one in (bring, merge, export, clean):
        _common(one)


def _annotations(args: argparse.Namespace) -> int:
    return {"import": _import_annotations, "merge": _merge, "export": _export_annotations, "clean": _clean}[
        args.action
    ](args)


def _import_annotations(args: argparse.Namespace) -> int:
    from milan_ray.annotations.load import load
    from milan_ray.annotations.quirks import Quirks
    from milan_ray.pipelines.annotations_import import SOURCE, import_csv, run_import

    storage, source = _open_storage(args), args.source or SOURCE
    if args.set.endswith(".csv"):
        if args.model is None:
            raise MilanError("annotations from a CSV need --model, the model whose exemplars they speak of.")
        path = Path(_absolute("SET", args.set))
        import_csv(storage, path, args.model, source=source, annotation_count=args.annotation_count or None)
        return 0
    sets = load(
        args.set, images=args.images, labels=args.labels, download=args.download, layers=args.layers,
        annotation_count=args.annotation_count, quirks=Quirks(merge_geometry=args.reference_quirks),
    )  # fmt: skip
    if args.model is not None and len(sets) > 1:
        raise MilanError(f"--model names one model, but {args.set} is {len(sets)} sets; import them one by one.")
    for one in sets:
        run_import(storage, one, model=args.model, source=source)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from milan_ray.annotations.groups import locate
    from milan_ray.annotations.load import merge_images
    from milan_ray.annotations.quirks import Quirks

    for location in locate(args.set):
        merge_images(location, args.images, args.labels, Quirks(merge_geometry=args.reference_quirks))
    return 0


def _export_annotations(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.annotations_export import run_export

    folder = Path(_absolute("DIR", args.folder))
    layers = run_export(_open_storage(args), args.model, folder, source=args.source, layers=args.layers)
    say(f"export: {len(layers)} layers of {args.model} in {folder}")
    return 0


def _clean(args: argparse.Namespace) -> int:
    from milan_ray.annotations.cleaning import clean_results, read_tables

    tables = read_tables(Path(args.tables)) if args.tables else None
    kept, rejected = clean_results(Path(args.results), Path(args.out), tables, keep_rejected=args.keep_rejected)
    say(f"clean: {kept} annotations in {args.out}, {rejected} rejected ones left out")
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="FILE", help="checkpoint to write, e.g. milan-mine.pth")
    for add in (_captioner_options, _download, _storage, _plugins, _common):
        add(parser)


def _export(args: argparse.Namespace) -> int:
    from milan_ray.captioner.checkpoints import export_reference
    from milan_ray.pipelines.captioners import load_captioner
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    storage = _open_storage(args)
    decoder = _decoder(args, storage)
    captioner = load_captioner(storage, decoder)
    if captioner.encoder_state is None:
        encoder = _encoder(args, captioner.encoder_name, storage, decoder).load()
        captioner = replace(captioner, encoder_state=encoder.backbone.state_dict())
    export_reference(captioner, _absolute("FILE", args.out))
    say(f"export: {args.out}, a checkpoint that MILAN's reference implementation loads")
    return 0


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "models": ("list models, or one model's layers", _add_models, _list_models),
    "exemplars": ("find every unit's exemplars and masks", _add_exemplars, _exemplars),
    "describe": ("describe every unit of models", _add_describe, _describe),
    "label": ("label every unit by the concept maps of its probe", _add_label, _label),
    "train": ("train a captioner on annotated units", _add_train, _train),
    "annotations": ("bring published annotations in, out, and into shape", _add_annotations, _annotations),
    "export": ("write a captioner as a checkpoint of the reference implementation", _add_export, _export),
    "tune": ("choose λ, beam size and strategy on annotated units", _add_tune, _tune),
    "demo": ("run everything on the built-in world", _add_demo, _demo),
    "report": ("write the HTML report of a storage", _add_report, _report),
    "status": ("list what a storage holds, stale, orphaned and unfinished", _add_status, _status),
    "benchmark": ("measure a stage beside its bare computation", _add_benchmark, _benchmark),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: The command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0 when all is done, 1 when something could not be.
    """
    parser = argparse.ArgumentParser(
        prog="milan-ray", description="Natural-language descriptions of every unit of vision models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (summary, add, run) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".", formatter_class=_Help)
        add(verb)
        verb.set_defaults(run=run)
    args = parser.parse_args(arguments)
    runtime.prepare(getattr(args, "address", None))
    if args.log is not None:
        os.environ[LOG] = args.log
    try:
        return args.run(args)
    except MilanError as error:
        if args.debug:
            raise
        say(f"error: {error}", level="error")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on from here.", level="error")
        return 130


if __name__ == "__main__":
    sys.exit(main())
