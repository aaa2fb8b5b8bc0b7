"""The command line: ``milan-ray VERB …``, and ``python -m jobs.VERB …`` for ``ray job submit``.

Torch and Ray are imported by the verb that needs them, after :func:`milan_ray.runtime.prepare` has settled the
environment they read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray import runtime
from milan_ray.config import ExemplarConfig, Resources, results_dir
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


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        default=None,
        help="run directory that holds all tables: a path, s3://… or gs://… (default: $MILAN_RESULTS_DIR, else ./results)",
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
    group.add_argument("--actors", type=int, help="actors per pool (default: one per GPU, else one per CPU)")
    group.add_argument("--cpus-per-actor", type=float, default=1, help="CPUs and torch threads of each actor")
    group.add_argument("--gpus-per-actor", type=float, help="GPUs of each actor, fractions allowed (default: 1 if any)")
    group.add_argument("--device", default="auto", help="where models run: auto, cpu, cuda, cuda:1, …")


def _models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--model", nargs="+", required=True, metavar="NAME", help="registered models; see jobs.models")
    group.add_argument("--weights", metavar="FILE", help="weights file for the one model given, or 'random'")
    group.add_argument("--layers", nargs="+", default=[], metavar="PATH", help="layers (default: the model's own list)")
    group.add_argument("--download", action="store_true", help="fetch the model's published weights if absent")


def _probe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("probe images")
    group.add_argument("--probe", nargs="+", required=True, metavar="SOURCE", help="folders, URIs or a registered probe")
    group.add_argument("--labels", metavar="FILE", help="CSV of file names and classes, for folders without classes")
    group.add_argument(
        "--max-bad", type=float, default=EXEMPLARS.max_bad, help="share of unreadable images above which to fail"
    )


def _exemplar_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("exemplars")
    group.add_argument("--k", type=int, default=EXEMPLARS.k, help="exemplars per unit, images")
    group.add_argument("--quantile", type=float, default=EXEMPLARS.quantile, help="activation quantile of the level η")
    group.add_argument("--batch-size", type=int, default=EXEMPLARS.batch_size, help="images per forward pass")
    group.add_argument("--shard-size", type=int, default=EXEMPLARS.shard_size, help="images per unit of work")


def _report_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")


def _decoder_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("descriptions")
    group.add_argument("--decoder", required=True, help="captioner: a name trained into the storage, or its folder")
    group.add_argument("--lam", type=float, default=0.2, help="λ of log p(d|E) − λ·log p(d)")
    group.add_argument("--beam-size", type=int, default=50, help="width of the beam")
    group.add_argument("--length", type=int, default=15, help="most tokens of a description, <stop> included")


# -- from arguments to records ----------------------------------------------------------------------------------


def _open_storage(args: argparse.Namespace) -> Storage:
    from milan_ray.storage import Storage

    _refuse_relative("--storage", args.storage or str(results_dir()), given=args.storage)
    return Storage(args.storage or results_dir())


def _refuse_relative(option: str, path: str, given: str | None) -> None:
    relative = "://" not in path and (given is None or not Path(given).expanduser().is_absolute())
    if relative and runtime.in_submitted_job():
        raise MilanError(
            f"{option} must be an absolute path or a URI inside a submitted job (got {given or 'none'}): "
            "the working directory there is a temporary copy."
        )


def _resources_of(args: argparse.Namespace) -> Resources:
    return Resources(args.address, args.actors, args.cpus_per_actor, args.gpus_per_actor)


def _model_requests(args: argparse.Namespace) -> list[ModelRequest]:
    from milan_ray.models.resolve import resolve_model
    from milan_ray.pipelines.requests import ModelRequest
    from milan_ray.plugins import load_plugins

    if args.weights is not None:
        if len(args.model) > 1:
            raise MilanError("--weights names the weights of one model; give a single --model with it.")
        if args.weights != "random":
            _refuse_relative("--weights", args.weights, args.weights)
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
        if source in probe_names() or "://" in source:
            sources.append(source)
        else:
            _refuse_relative("--probe", source, source)
            sources.append(str(Path(source).expanduser().absolute()))
    labels = None
    if args.labels is not None:
        _refuse_relative("--labels", args.labels, args.labels)
        labels = str(Path(args.labels).expanduser().absolute())
    return ProbeRequest(tuple(sources), labels, tuple(args.plugin))


def _exemplar_config(args: argparse.Namespace) -> ExemplarConfig:
    return ExemplarConfig(
        k=args.k,
        quantile=args.quantile,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        max_bad=args.max_bad,
    )


def _write_report(args: argparse.Namespace, storage: Storage, models: Sequence[str] | None = None) -> None:
    from milan_ray.progress import say
    from milan_ray.report import write_report

    if args.no_report:
        return
    if args.report is None and not storage.is_local:
        say("report: skipped; give --report DIR to write one beside a remote storage")
        return
    target = Path(args.report) if args.report else Path(storage.root) / "report"
    index = write_report(storage, target, models=models)
    say(f"report: {index}")


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
        done = run_exemplars(storage, models, probe, _exemplar_config(args), resources, args.device)
    say(f"exemplars: {sum(map(len, done.models.values()))} layers of {len(done.models)} models in {storage.root}")
    _write_report(args, storage, list(done.models))
    return 1 if done.failed else 0


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
    parser.add_argument("--model", nargs="*", metavar="NAME", help="only these models")
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
