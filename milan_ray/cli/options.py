"""Groups of options that subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from milan_ray.cli.arguments import (
    amount,
    choice,
    device,
    flag,
    fraction,
    grid,
    integer,
    names,
    number,
    numbers,
    string,
    strings,
)
from milan_ray.config import FLOAT32, ContrastConfig, ExemplarConfig

EXEMPLARS, CONTRASTS = ExemplarConfig(), ContrastConfig()

MU = 0.3
"""μ of contrastive descriptions."""


def add_to(parser: argparse.ArgumentParser, *groups: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds groups of options to a subcommand, in this order."""
    for group in groups:
        group(parser)


def common(parser: argparse.ArgumentParser, json: str | None = None) -> None:
    """Adds the options of every subcommand (docs/command-line.md).

    Args:
        parser: The subcommand's parser.
        json: Help of ``--json`` for a subcommand that prints its result; None if ``--json`` prints the closing summary.
            An existing option of that name is kept.
    """
    group = parser.add_argument_group("every verb")
    string(group, "--config", "FILE", "options from a YAML file, lines of 'option: value'; the command line wins")
    flag(group, "--quiet", "say nothing but warnings and errors")
    own = "--json" in parser._option_string_actions
    if not own:
        about = json or "print the closing summary on standard output, as one JSON object"
        flag(group, "--json", about)
    choice(group, "--log", ("text", "json"), "form of the log (default: $MILAN_LOG, else text)")
    flag(group, "--debug", "show the traceback of an error")
    parser.set_defaults(prints_result=own or json is not None)


def storage(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the run directory."""
    string(
        parser, "--storage", "DIR", "run directory: path, s3://…, gs://… (default: $MILAN_RESULTS_DIR, else ./results)"
    )


def download(parser: argparse.ArgumentParser) -> None:
    """Adds ``--download``."""
    flag(parser, "--download", "fetch published weights that are absent")


def quirks(parser: argparse.ArgumentParser) -> None:
    """Adds options to reproduce the reference's defects."""
    flag(parser, "--reference-quirks", "reproduce the reference's defects too (ARCHITECTURE.md)")


def dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dry-run``."""
    flag(parser, "--dry-run", "say what would be made and why, and make nothing")


def units(parser: argparse.ArgumentParser) -> None:
    """Adds options to select units."""
    string(parser, "--units", "1,5,7-12", "describe only these units of every layer", (), type=numbers)


def plugins(parser: argparse.ArgumentParser) -> None:
    """Adds the option for plug-ins, modules that register models or probes."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="importable module or .py file that registers models or probes; may be repeated",
    )


def resources(parser: argparse.ArgumentParser) -> None:
    """Adds options for the cluster and device."""
    group = parser.add_argument_group("cluster")
    string(group, "--address", "ADDRESS", "Ray cluster to join (default: $RAY_ADDRESS, else a local one of our own)")
    integer(group, "--actors", None, "most actors of a pool (default: one per GPU, else per CPU)")
    integer(group, "--cpus-per-actor", 1, "CPUs and torch threads of each actor")
    number(group, "--gpus-per-actor", None, "GPUs of each actor, fractions allowed (default: 1 if any)", kind=amount)
    string(group, "--device", "DEVICE", "where models run: auto, cpu or cuda", "auto", type=device)


def models(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds options for models, weights and layers."""
    group = parser.add_argument_group("models")
    which = group.add_mutually_exclusive_group(required=required)
    strings(which, "--model", "NAME", "registered models, or patterns ('resnet*/imagenet'); see jobs.models")
    zoo = "the same as one word: 'imagenet,imagenet-blurred' is every …/imagenet and …/imagenet-blurred"
    string(which, "--zoo", "NAMES", zoo, type=names, dest="model")
    string(
        group, "--weights", "WEIGHTS", "file, URL, name of published ones (IMAGENET1K_V2) or 'random'; for one model"
    )
    layers = "layers, or registered feature sets as LAYER#NAME (default: the model's own list)"
    strings(group, "--layers", "PATH", layers, default=[])
    features = "features of one model's layer, dissected like units: a checkpoint of a sparse autoencoder, or a matrix"
    strings(group, "--features", "LAYER=FILE", f"{features} of directions (docs/features.md)", default=[])
    activations(group)
    reading(group)


def activations(group: argparse._ActionsContainer) -> None:
    """Adds the option for which values of a layer count."""
    choice(
        group,
        "--activations",
        ("seen", "pre", "post"),
        "of a layer with an activation function behind it: what the reference sees (values after it where it "
        "works in place, else before), always before, or always after",
        "seen",
    )


def reading(group: argparse._ActionsContainer) -> None:
    """Adds options for the layout of layers' outputs, for use where it cannot be inferred (docs/layouts.md)."""
    integer(group, "--units-axis", None, "axis of the layers' outputs that counts units; -1 is the last", least=None)
    integer(group, "--batch-axis", None, "axis of the layers' outputs that counts images", least=None)
    string(group, "--layer-grid", "HxW", "height and width of the layers' positions, as 16x8", type=grid)
    integer(group, "--prefix-tokens", None, "tokens before the positions (CLS, registers), left out", least=None)


def described(parser: argparse.ArgumentParser) -> None:
    """Adds options to select described models and layers."""
    strings(parser, "--model", "NAME", "only these models, or patterns ('resnet*')")
    strings(parser, "--layers", "PATH", "only these layers, or patterns")


def probe(
    parser: argparse.ArgumentParser, required: bool, absent: str = "describe the exemplars that the storage holds"
) -> None:
    """Adds options for probe images; ``absent`` says what happens without any."""
    group = parser.add_argument_group("probe images")
    strings(
        group,
        "--probe",
        "SOURCE",
        "folders, Parquet, Arrow or tar files, URIs, or a registered probe; of a generator, its latents"
        + ("" if required else f" (default: {absent})"),
        required=required,
    )
    string(group, "--labels", "FILE", "CSV of file names and classes, for folders without classes")
    columns(group)
    fraction(group, "--max-bad", EXEMPLARS.max_bad, "share of unreadable images above which to fail")


def columns(parser: argparse._ActionsContainer) -> None:
    """Adds options for the columns of images and classes in tables and archives."""
    string(
        parser,
        "--image-column",
        "NAME",
        "of Parquet and Arrow files, the column of images; of tar files, the part of a sample, such as jpg "
        "(default: found where only one can be meant)",
    )
    string(
        parser,
        "--label-column",
        "NAME",
        "of Parquet and Arrow files, the column of classes; of tar files, the part of a sample, such as cls, or a "
        "field of its json (default: label, the one column of class names, or cls, json, txt)",
    )


def exemplars(parser: argparse.ArgumentParser) -> None:
    """Adds options for the computation of exemplars."""
    group = parser.add_argument_group("exemplars")
    integer(group, "--k", EXEMPLARS.k, "exemplars per unit, images")
    fraction(group, "--quantile", EXEMPLARS.quantile, "activation quantile of the level η")
    integer(group, "--batch-size", EXEMPLARS.batch_size, "images per forward pass")
    integer(group, "--shard-size", None, "images per unit of work (default: at most 256)")
    precision(group)
    flag(group, "--pooled", "also store every unit's maximum and mean on every image, which some labelers read")


def precision(group: argparse._ActionsContainer) -> None:
    """Adds options for the arithmetic of the dissected models."""
    choice(
        group,
        "--precision",
        ("float32", "bfloat16", "float16"),
        "how the dissected models compute; below float32 activations are rounded, so that images may tie and "
        "masks change",
        FLOAT32.precision,
    )
    flag(group, "--channels-last", "channels last in memory: faster, equal within float error; not for every model")


def language(parser: argparse._ActionsContainer) -> None:
    """Adds the option for the spaCy pipeline that parses descriptions."""
    string(
        parser,
        "--language",
        "PIPELINE",
        "spaCy pipeline, installed or a directory (default: en_core_web_lg, _md or _sm where installed, else a "
        "small one trained on the built-in world's sentences)",
    )


def report(parser: argparse.ArgumentParser) -> None:
    """Adds options for the report's location."""
    string(parser, "--report", "DIR", "folder for the HTML report (default: report/ in the storage)")
    flag(parser, "--no-report", "write no HTML report")


def captioner(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds options to select a captioner."""
    group = parser.add_argument_group("captioner")
    captioner = group.add_mutually_exclusive_group(required=required)
    string(captioner, "--decoder", "NAME", "captioner: a name trained into the storage, its folder, or a .pth file")
    string(
        captioner,
        "--milan",
        "KEY",
        "published captioner: base, cls, gen, imagenet, places365, alexnet, resnet152, biggan, "
        "not-alexnet-imagenet, …; looked for in $MILAN_MODELS_DIR, else downloaded there",
    )
    string(
        group, "--encoder-weights", "FILE", "weights of the encoder (default: the captioner's, else the encoder's own)"
    )


def clip(parser: argparse.ArgumentParser) -> None:
    """Adds options for re-ranking by an image-text model."""
    group = parser.add_argument_group("re-ranking by a model of images and texts, as labeler milan+clip")
    group.add_argument(
        "--clip",
        nargs="?",
        const="",
        metavar="MODEL",
        help="re-rank the candidates of a wide beam by CLIP or SigLIP: a folder, or the name of one in "
        "$MILAN_MODELS_DIR (alone, or with --milan KEY+clip: clip-vit-base-patch32)",
    )
    fraction(group, "--clip-z", 0.5, "weight of whole images against their masked regions")
    integer(group, "--clip-beam-size", None, "candidates per unit (default: 1000, or the vocabulary)")
    number(group, "--clip-lam", 0.5, "λ that the search for candidates subtracts with")


def contrast(parser: argparse.ArgumentParser) -> None:
    """Adds options for descriptions that set exemplars against images that do not excite the unit."""
    group = parser.add_argument_group("contrast, as labeler milan-contrast")
    string(
        group,
        "--contrast",
        "MODEL",
        "rank candidates by log p(d|E) − λ·log p(d) − μ·log p(d|C) too, C the images most like the exemplars by this "
        "model of images and texts that do not excite the unit: a folder, or the name of one in $MILAN_MODELS_DIR",
    )
    number(group, "--mu", None, f"μ (default: the setting's, else {MU:g})", kind=amount)
    number(
        group,
        "--clip-gamma",
        None,
        "with --clip, also re-rank by the similarity to the exemplars less N times that to the contrasts, as labeler "
        "milan+clip-contrast",
        kind=amount,
    )
    contrasts(group)
    choice(
        group,
        "--contrast-masks",
        ("exemplar", "whole"),
        "part of a contrast that the captioner reads: the mask of the exemplar that it is paired with, or all of it",
        "exemplar",
    )


def contrasts(group: argparse._ActionsContainer) -> None:
    """Adds options for the choice of contrasts."""
    integer(group, "--contrasts", CONTRASTS.similar, "images per unit that are most like its exemplars", least=0)
    integer(group, "--random-contrasts", CONTRASTS.random, "random images per unit besides", least=0)
    fraction(
        group,
        "--contrast-quantile",
        CONTRASTS.quantile,
        "an image does not excite a unit whose activation is at most this quantile of the unit's",
    )


def search(parser: argparse.ArgumentParser) -> None:
    """Adds options for the beam search of descriptions."""
    group = parser.add_argument_group("descriptions")
    string(group, "--setting", "FILE", "λ, beam size and length as jobs.tune chose them; the options below win")
    number(group, "--lam", None, "λ of log p(d|E) − λ·log p(d) (default: the captioner's own, as a rule 0.2)")
    integer(group, "--beam-size", None, "width of the beam (default: the captioner's own, 50)")
    integer(group, "--length", None, "most tokens, <stop> included (default: the captioner's own, 15)")


def bertscore(parser: argparse._ActionsContainer) -> None:
    """Adds the option for BERTScore's language model."""
    string(parser, "--bertscore", "FOLDER", "language model for BERTScore (default: that of milan-ray[minilm])")


def stages(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that run stages: storage, plug-ins, cluster, dry run and the common ones."""
    add_to(parser, storage, plugins, resources, dry_run, common)


def job(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that run stages and end with a report."""
    add_to(parser, report, stages)


def supported(parser: argparse._ActionsContainer) -> None:
    """Adds ``--supported-by``."""
    string(
        parser,
        "--supported-by",
        "JUDGE",
        "read only descriptions that the verdicts of this judge (--clip of jobs.score) support",
    )


def experiment(parser: argparse.ArgumentParser) -> None:
    """Adds the common options of subcommands that run experiments on networks with images."""
    models(parser)
    probe(parser, required=True)
    add_to(parser, download, job)


def dissection(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that dissect models: models, exemplars, downloads, quirks and :func:`job`."""
    add_to(parser, models, exemplars, download, quirks, job)
