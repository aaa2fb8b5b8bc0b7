"""The command line: ``milan-ray VERB …``, and ``python -m jobs.VERB …`` for ``ray job submit``.

Torch and Ray are imported by the verb that needs them, after :func:`milan_ray.runtime.prepare` has settled the
environment they read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray import runtime
from milan_ray.config import ExemplarConfig, Resources, TrainingConfig, results_dir
from milan_ray.errors import MilanError

if TYPE_CHECKING:
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


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        default=None,
        help="run directory of all tables: a path, s3://…, gs://… (default: $MILAN_RESULTS_DIR, else ./results)",
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
    group.add_argument("--actors", type=positive, help="actors per pool (default: one per GPU, else one per CPU)")
    group.add_argument("--cpus-per-actor", type=positive, default=1, help="CPUs and torch threads of each actor")
    group.add_argument("--gpus-per-actor", type=float, help="GPUs of each actor, fractions allowed (default: 1 if any)")
    group.add_argument("--device", default="auto", help="where models run: auto, cpu or cuda")


def _models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--model", nargs="+", required=True, metavar="NAME", help="registered models; see jobs.models")
    group.add_argument("--weights", metavar="FILE", help="weights file for the one model given, or 'random'")
    group.add_argument("--layers", nargs="+", default=[], metavar="PATH", help="layers (default: the model's own list)")
    group.add_argument("--download", action="store_true", help="fetch the model's published weights if absent")


def _probe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("probe images")
    group.add_argument(
        "--probe", nargs="+", required=True, metavar="SOURCE", help="folders, URIs or a registered probe"
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
    group.add_argument("--shard-size", type=positive, default=EXEMPLARS.shard_size, help="images per unit of work")


def _report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")


def _decoder_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("descriptions")
    group.add_argument("--decoder", required=True, help="captioner: a name trained into the storage, or its folder")
    group.add_argument(
        "--encoder-weights", metavar="FILE", help="weights of the captioner's encoder, if it brings none"
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
    from milan_ray.models.resolve import resolve_model
    from milan_ray.pipelines.requests import ModelRequest
    from milan_ray.plugins import load_plugins

    if args.weights is not None:
        if len(args.model) > 1:
            raise MilanError("--weights names the weights of one model; give a single --model with it.")
        if args.weights != "random":
            args.weights = _absolute("--weights", args.weights)
    load_plugins(args.plugin)
    found = []
    for name in args.model:
        spec = resolve_model(name, args.weights, args.layers, download=args.download)
        found.append(ModelRequest(name, spec.weights, tuple(args.layers), tuple(args.plugin)))
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
    return ProbeRequest(tuple(sources), labels, tuple(args.plugin))


def _exemplar_config(args: argparse.Namespace) -> ExemplarConfig:
    return ExemplarConfig(
        k=args.k,
        quantile=args.quantile,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        max_bad=args.max_bad,
    )


def _write_report(
    args: argparse.Namespace,
    storage: Storage,
    models: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    from milan_ray.progress import say
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
    for add in (_models, _probe, _exemplar_options, _storage, _report_option, _plugins, _resources, _common):
        add(parser)


def _exemplars(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.progress import say

    storage, probe, models = _open_storage(args), _probe_request(args), _model_requests(args)
    resources = _resources_of(args)
    storage.check_writable()
    with connected(resources):
        done = run_exemplars(storage, models, probe, _exemplar_config(args), resources)
    say(f"exemplars: {sum(map(len, done.models.values()))} layers of {len(done.models)} models in {storage.root}")
    _write_report(args, storage, list(done.models))
    return 1 if done.failed else 0


def _add_describe(parser: argparse.ArgumentParser) -> None:
    adders = (
        _models, _probe, _exemplar_options, _decoder_options, _storage, _report_option, _plugins, _resources, _common
    )  # fmt: skip
    for add in adders:
        add(parser)


def _describe(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.captioners import EncoderRequest, about_captioner, load_captioner
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.describe import Search, run_descriptions
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.exemplars import run_exemplars
    from milan_ray.progress import say

    storage, probe, models = _open_storage(args), _probe_request(args), _model_requests(args)
    resources = _resources_of(args)
    decoder = _decoder(args, storage)
    captioner = load_captioner(storage, decoder)
    plugins = tuple(args.plugin)
    weights = None if args.encoder_weights is None else _absolute("--encoder-weights", args.encoder_weights)
    encoder = EncoderRequest(captioner.encoder_name, weights, storage, decoder, plugins)
    encoder.load()
    search = Search(decoder, args.beam_size, args.length, args.lam)
    with connected(resources):
        done = run_exemplars(storage, models, probe, _exemplar_config(args), resources)
        run_encodings(storage, done.models, encoder, resources)
        run_descriptions(storage, done.models, search, resources)
    say(f"descriptions: {sum(map(len, done.models.values()))} layers of {len(done.models)} models in {storage.root}")
    about = about_captioner(storage, decoder)
    _write_report(args, storage, list(done.models), {"About the descriptions": about} if about else None)
    return 1 if done.failed else 0


def _decoder(args: argparse.Namespace, storage: Storage) -> str:
    """The captioner as workers will find it: a name in the storage, or an absolute path."""
    from milan_ray.pipelines.captioners import has_captioner

    if has_captioner(storage, args.decoder) or not Path(args.decoder).expanduser().exists():
        return args.decoder
    return _absolute("--decoder", args.decoder)


def _add_train(parser: argparse.ArgumentParser) -> None:
    config = TrainingConfig()
    parser.add_argument("--name", required=True, help="name of the captioner in the storage")
    parser.add_argument("--annotations", required=True, metavar="SOURCE", help="source of the annotations to train on")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="only annotated units of these models (default: all)"
    )
    parser.add_argument("--encoder", default="resnet101", help="image encoder")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights file of the encoder (default: its own)")
    parser.add_argument("--epochs", type=positive, default=config.max_epochs, help="epochs at most, of each model")
    parser.add_argument("--patience", type=int, default=config.patience, help="epochs without improvement forgiven")
    parser.add_argument("--hold-out", type=share, default=config.hold_out, help="share of units held out to stop early")
    parser.add_argument("--hidden", type=positive, default=512, help="LSTM state, units")
    parser.add_argument("--embedding", type=positive, default=128, help="token embedding, units")
    parser.add_argument("--seed", type=int, default=config.seed, help="of weights, dropout and order")
    parser.add_argument("--workers", type=positive, default=1, help="data-parallel training workers")
    for add in (_storage, _plugins, _resources, _common):
        add(parser)


def _train(args: argparse.Namespace) -> int:
    from milan_ray.pipelines.captioners import EncoderRequest
    from milan_ray.pipelines.cluster import connected, gpus_each
    from milan_ray.pipelines.encodings import run_encodings
    from milan_ray.pipelines.train import Sizes, TrainingJob, run_training
    from milan_ray.schema import ANNOTATIONS

    storage, resources = _open_storage(args), _resources_of(args)
    found = storage.partitions(ANNOTATIONS, source=args.annotations)
    layers = [(keys["model"], keys["layer"]) for keys in found if not args.model or keys["model"] in args.model]
    if not layers:
        raise MilanError(f"no annotations of source {args.annotations!r} for these models in {storage.root}.")
    weights = None if args.encoder_weights is None else _absolute("--encoder-weights", args.encoder_weights)
    encoder = EncoderRequest(args.encoder, weights, plugins=tuple(args.plugin))
    config = TrainingConfig(max_epochs=args.epochs, patience=args.patience, hold_out=args.hold_out, seed=args.seed)
    models: dict[str, list[str]] = {}
    for model, layer in layers:
        models.setdefault(model, []).append(layer)
    with connected(resources):
        run_encodings(storage, models, encoder, resources)
        job = TrainingJob(
            args.name,
            args.annotations,
            tuple(layers),
            encoder,
            config,
            Sizes(args.embedding, args.hidden),
            args.workers,
            resources.cpus_per_actor,
            gpus_each(resources),
            resources.threads,
        )
        run_training(storage, job)
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    for add in (_storage, _report_option, _resources, _common):
        add(parser)


def _demo(args: argparse.Namespace) -> int:
    import time

    from milan_ray.pipelines.captioners import about_captioner
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.demo import DECODER, run_demo, summary
    from milan_ray.plugins import load_plugins
    from milan_ray.progress import say
    from milan_ray.schema import DESCRIPTIONS

    started = time.monotonic()
    load_plugins()
    if args.storage is None:
        args.storage = str(results_dir() / "demo")
    storage, resources = _open_storage(args), _resources_of(args)
    storage.check_writable()
    say(f"the built-in world, end to end, into {storage.root}")
    with connected(resources):
        scores = run_demo(storage, resources, max(1, (os.cpu_count() or 1) // 2 * 2))
    _write_report(args, storage, notes={"About the descriptions": about_captioner(storage, DECODER)})
    layers = storage.partitions(DESCRIPTIONS, labeler="milan")
    units = sum(len(storage.read(DESCRIPTIONS, ["unit"], **keys)) for keys in layers)
    say(f"\n{units} units of {len({keys['model'] for keys in layers})} networks described. Beside what costs nothing:")
    say(summary(scores))
    say(f"tables: {storage.uri('descriptions')}/**/*.parquet, and the others beside it")
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a model whose layers to list, with shapes and unit counts")
    parser.add_argument("--weights", metavar="FILE", help="weights file of that model")
    for add in (_plugins, _common):
        add(parser)


def _list_models(args: argparse.Namespace) -> int:
    from milan_ray.models.describe import layer_table
    from milan_ray.models.registry import get_model, model_names
    from milan_ray.models.resolve import resolve_model
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    if args.name is None:
        for name in model_names():
            print(name)
        return 0
    spec = resolve_model(args.name, args.weights) if args.weights else get_model(args.name)
    print(f"{'layer':40} {'module':24} {'shape':20} {'units':>6}  default")
    for layer in layer_table(spec):
        shape = "×".join(map(str, layer.shape)) if layer.shape else "-"
        units = layer.units if layer.units is not None else "-"
        print(f"{layer.path:40} {layer.kind:24} {shape:20} {units:>6}  {'*' if layer.default else ''}")
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


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "models": ("list models, or one model's layers", _add_models, _list_models),
    "exemplars": ("find every unit's exemplars and masks", _add_exemplars, _exemplars),
    "describe": ("describe every unit of models", _add_describe, _describe),
    "train": ("train a captioner on annotated units", _add_train, _train),
    "demo": ("run everything on the built-in world", _add_demo, _demo),
    "report": ("write the HTML report of a storage", _add_report, _report),
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
    try:
        return args.run(args)
    except MilanError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
