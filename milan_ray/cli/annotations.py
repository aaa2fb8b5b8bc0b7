"""``milan-ray annotations``: imports, exports, merges and cleans annotated sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from milan_ray.cli import annotation_collection, options
from milan_ray.cli.arguments import Help, flag, integer, string, strings, table_name
from milan_ray.cli.build_configs import absolute, open_storage
from milan_ray.cli.refusals import given, refuse
from milan_ray.cli.summary import note
from milan_ray.errors import MilanError
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=summary, description=summary + ".", formatter_class=Help)

    sets = "group (base, cls, gen, …), set (alexnet/imagenet, …), folder or zip"
    bring = action("import", "Bring published exemplars and annotations into the storage")
    string(bring, "set", "SET", f"{sets}; or a CSV (layer, unit, summary) for the exemplars of --model")
    string(bring, "--model", "MODEL", "name of the model in the storage (default: the set's)", type=table_name)
    strings(bring, "--layers", "LAYER", "only these layers")
    flag(bring, "--download", "fetch released sets that are absent")
    integer(
        bring,
        "--annotation-count",
        None,
        "the first N annotations of units that have as many; 0 for all (default: 3 for released sets, else 0)",
        least=0,
    )
    merge = action("merge", "Give masks-only sets the images of a local ImageNet or Places folder")
    string(merge, "set", "SET", sets)
    for verb in (bring, merge):
        strings(
            verb, "--images", "DIR", "source images by class (default: $MILAN_DATA_DIR/imagenet/val, …)", default=[]
        )
        string(verb, "--labels", "FILE", "classes of source images in a flat folder")
        flag(verb, "--reference-quirks", "squash images as the reference's merge does")
    export = action("export", "Write exemplars and annotations of a model as a published set")
    string(export, "model", "MODEL", "a model with exemplars in the storage")
    string(export, "folder", "DIR", "folder to be made")
    strings(export, "--layers", "LAYER", "only these layers")
    clean = action("clean", "Clean raw crowd results into an annotations.csv")
    string(clean, "results", "FILE", "Mechanical Turk's CSV")
    string(clean, "out", "FILE", "annotations.csv to write")
    string(clean, "--tables", "JSON", "prefixes, substrings, suffixes, exact, words, workers: replacements")
    flag(clean, "--keep-rejected", "keep what was rejected")
    annotation_collection.add_to(action)
    for verb in (bring, export):
        string(
            verb,
            "--source",
            "SOURCE",
            "source of the annotations (default: milannotations; export: the only one)",
            type=table_name if verb is bring else str,
        )
        options.storage(verb)
    for verb in (bring, merge, export, clean):
        options.common(verb)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    work = {"import": _import_annotations, "merge": _merge, "export": _export_annotations, "clean": _clean}
    return {**work, **annotation_collection.ACTIONS}[args.action](args)


def _import_annotations(args: argparse.Namespace) -> int:
    from milan_ray.annotations.load import load
    from milan_ray.annotations.quirks import Quirks
    from milan_ray.stages.annotations_import import SOURCE, import_csv, run_import

    storage, source = open_storage(args), args.source or SOURCE
    if args.set.lower().endswith(".csv"):
        if args.model is None:
            raise MilanError("annotations from a CSV need --model, the model whose exemplars they speak of.")
        others = ["download", "images", "labels", "reference_quirks"]
        refuse(args, others, "for a CSV of annotations", "name a published set instead")
        path = Path(absolute("SET", args.set))
        count = import_csv(
            storage, path, args.model, source=source, annotation_count=args.annotation_count or None,
            layers=args.layers,
        )  # fmt: skip
        say(f"train with them: jobs.train --annotations {source} --encoder NAME")
        note(args, f"{count} annotations of {args.model}", source=source, annotations=count)
        return 0
    _refuse(args, args.download)
    sets = load(
        args.set, images=args.images, labels=args.labels, download=args.download, layers=args.layers,
        annotation_count=args.annotation_count, quirks=Quirks(merge_geometry=args.reference_quirks),
    )  # fmt: skip
    if args.model is not None and len(sets) > 1:
        raise MilanError(f"--model names one model, but {args.set} is {len(sets)} sets; import them one by one.")
    for published in sets:
        run_import(storage, published, model=args.model, source=source)
    return 0


def _refuse(args: argparse.Namespace, download: bool = False) -> None:
    """Rejects options on source images if no set needs any.

    Raises:
        MilanError: Such an option was given.
    """
    from milan_ray.annotations.groups import locate
    from milan_ray.annotations.load import bare_layers

    names = ["images", "labels", "reference_quirks"]
    if given(args, names) and not any(bare_layers(location) for location in locate(args.set, download=download)):
        refuse(args, names, f"for {args.set}, which came with its images,", "name a set that came with masks only")


def _merge(args: argparse.Namespace) -> int:
    from milan_ray.annotations.groups import locate
    from milan_ray.annotations.load import merge_images
    from milan_ray.annotations.quirks import Quirks

    _refuse(args)
    for location in locate(args.set):
        merge_images(location, args.images, args.labels, Quirks(merge_geometry=args.reference_quirks))
    return 0


def _export_annotations(args: argparse.Namespace) -> int:
    from milan_ray.stages.annotations_export import run_export

    folder = Path(absolute("DIR", args.folder))
    layers = run_export(open_storage(args), args.model, folder, source=args.source, layers=args.layers)
    note(args, f"{len(layers)} layers of {args.model} in {folder}", folder=str(folder))
    return 0


def _clean(args: argparse.Namespace) -> int:
    from milan_ray.annotations.cleaning import clean_results, read_tables

    tables = read_tables(Path(args.tables)) if args.tables else None
    kept, rejected = clean_results(Path(args.results), Path(args.out), tables, keep_rejected=args.keep_rejected)
    note(args, f"{kept} annotations in {args.out}, {rejected} rejected ones left out,", kept=kept, rejected=rejected)
    return 0
