"""Groups of options that subcommands share, and argument types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from milan_ray.config import FLOAT32, ExemplarConfig
from milan_ray.errors import MilanError
from milan_ray.names import checked_name

EXEMPLARS = ExemplarConfig()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, except empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", [], ()):  # 0 == False
            return action.help
        return super()._get_help_string(action)


def amount(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0")
    return number


def device(text: str) -> str:
    """Argument type: a kind of device. Whether it exists is checked on the machine that computes."""
    if re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu and cuda")
    return text


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def count(text: str) -> int:
    """Argument type: an integer of at least 0, such as a count or a seed."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return number


def share(text: str) -> float:
    """Argument type: a number between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def gib(text: str) -> int:
    """Argument type: a size in GiB, converted to bytes."""
    return int(float(text) * 2**30)


def numbers(text: str) -> tuple[int, ...]:
    """Argument type: a selection of units by numbers and ranges."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))


def name(text: str) -> str:
    """Argument type: a name that is used as a folder name."""
    return _checked(text, slashes=False)


def table_name(text: str) -> str:
    """Argument type: a name that tables are stored under; like a model's name, it may contain slashes."""
    return _checked(text, slashes=True)


def tag(text: str) -> str:
    """Argument type: a suffix of a labeler's name; empty for none."""
    return text and name(text)


def _checked(text: str, slashes: bool) -> str:
    try:
        return checked_name("it", text, slashes=slashes)
    except MilanError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".").replace("%", "%%")) from error


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
    group.add_argument(
        "--config", metavar="FILE", help="options from a YAML file, lines of 'option: value'; the command line wins"
    )
    group.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    own = "--json" in parser._option_string_actions
    if not own:
        told = json or "print the closing summary on standard output, as one JSON object"
        group.add_argument("--json", action="store_true", help=told)
    group.add_argument("--log", choices=("text", "json"), help="form of the log (default: $MILAN_LOG, else text)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(prints_result=own or json is not None)


def storage(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the run directory."""
    parser.add_argument(
        "--storage",
        default=None,
        help="run directory of all tables: a path, s3://…, gs://… (default: $MILAN_RESULTS_DIR, else ./results)",
    )


def download(parser: argparse.ArgumentParser) -> None:
    """Adds ``--download``."""
    parser.add_argument("--download", action="store_true", help="fetch published weights that are absent")


def quirks(parser: argparse.ArgumentParser) -> None:
    """Adds options to reproduce the reference's defects."""
    parser.add_argument(
        "--reference-quirks", action="store_true", help="reproduce the reference's defects too (ARCHITECTURE.md)"
    )


def dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dry-run``."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be made and why, and make nothing")


def units(parser: argparse.ArgumentParser) -> None:
    """Adds options to select units."""
    parser.add_argument(
        "--units", type=numbers, default=(), metavar="1,5,7-12", help="describe only these units of every layer"
    )


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
    group.add_argument("--address", help="Ray cluster to join (default: $RAY_ADDRESS, else a local one of our own)")
    group.add_argument("--actors", type=positive, help="most actors of a pool (default: one per GPU, else per CPU)")
    group.add_argument("--cpus-per-actor", type=positive, default=1, help="CPUs and torch threads of each actor")
    group.add_argument(
        "--gpus-per-actor", type=amount, help="GPUs of each actor, fractions allowed (default: 1 if any)"
    )
    group.add_argument("--device", default="auto", type=device, help="where models run: auto, cpu or cuda")


def models(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds options for models, weights and layers."""
    group = parser.add_argument_group("models")
    which = group.add_mutually_exclusive_group(required=required)
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
    reading(group)


def reading(group: argparse._ActionsContainer) -> None:
    """Adds options for the layout of layers' outputs, for use where it cannot be inferred (docs/layouts.md)."""
    group.add_argument(
        "--units-axis", type=int, metavar="N", help="axis of the layers' outputs that counts units; -1 is the last"
    )
    group.add_argument("--batch-axis", type=int, metavar="N", help="axis of the layers' outputs that counts images")
    group.add_argument(
        "--layer-grid", type=grid, metavar="HxW", help="height and width of the layers' positions, as 16x8"
    )
    group.add_argument(
        "--prefix-tokens", type=int, metavar="N", help="tokens before the positions (CLS, registers), left out"
    )


def grid(text: str) -> tuple[int, int]:
    """Argument type: height and width."""
    height, _, width = text.lower().partition("x")
    return positive(height), positive(width)


def described(parser: argparse.ArgumentParser) -> None:
    """Adds options to select described models and layers."""
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these models, or patterns ('resnet*')")
    parser.add_argument("--layers", nargs="+", metavar="PATH", help="only these layers, or patterns")


def probe(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds options for probe images."""
    group = parser.add_argument_group("probe images")
    group.add_argument(
        "--probe",
        nargs="+",
        required=required,
        metavar="SOURCE",
        help="folders, Parquet, Arrow or tar files, URIs, or a registered probe; of a generator, its latents"
        + ("" if required else " (default: describe the exemplars that the storage holds)"),
    )
    group.add_argument("--labels", metavar="FILE", help="CSV of file names and classes, for folders without classes")
    columns(group)
    group.add_argument(
        "--max-bad", type=share, default=EXEMPLARS.max_bad, help="share of unreadable images above which to fail"
    )


def columns(parser: argparse._ActionsContainer) -> None:
    """Adds options for the columns of images and classes in tables and archives."""
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="of Parquet and Arrow files, the column of images; of tar files, the part of a sample, such as jpg "
        "(default: found where only one can be meant)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="of Parquet and Arrow files, the column of classes; of tar files, the part of a sample, such as cls, or a "
        "field of its json (default: label, the one column of class names, or cls, json, txt)",
    )


def exemplars(parser: argparse.ArgumentParser) -> None:
    """Adds options for the computation of exemplars."""
    group = parser.add_argument_group("exemplars")
    group.add_argument("--k", type=positive, default=EXEMPLARS.k, help="exemplars per unit, images")
    group.add_argument("--quantile", type=share, default=EXEMPLARS.quantile, help="activation quantile of the level η")
    group.add_argument("--batch-size", type=positive, default=EXEMPLARS.batch_size, help="images per forward pass")
    group.add_argument("--shard-size", type=positive, help="images per unit of work (default: at most 256)")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default=FLOAT32.precision,
        help="how the dissected models compute; below float32 activations are rounded, so that images may tie and "
        "masks change",
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


def language(parser: argparse._ActionsContainer) -> None:
    """Adds the option for the spaCy pipeline that parses descriptions."""
    parser.add_argument(
        "--language",
        metavar="PIPELINE",
        help="spaCy pipeline, installed or a directory (default: en_core_web_lg, _md or _sm where installed, else a "
        "small one trained on the built-in world's sentences)",
    )


def report(parser: argparse.ArgumentParser) -> None:
    """Adds options for the report's location."""
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")


def captioner(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds options to select a captioner."""
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
        "--encoder-weights",
        metavar="FILE",
        help="weights of the captioner's encoder (default: those that it brings, else the encoder's own)",
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
    group.add_argument(
        "--clip-z", type=share, default=0.5, metavar="Z", help="weight of whole images against their masked regions"
    )
    group.add_argument(
        "--clip-beam-size", type=positive, metavar="N", help="candidates per unit (default: 1000, or the vocabulary)"
    )
    group.add_argument(
        "--clip-lam", type=float, default=0.5, metavar="LAM", help="λ that the search for candidates subtracts with"
    )


def search(parser: argparse.ArgumentParser) -> None:
    """Adds options for the beam search of descriptions."""
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


def bertscore(parser: argparse._ActionsContainer) -> None:
    """Adds the option for BERTScore's language model."""
    parser.add_argument(
        "--bertscore", metavar="FOLDER", help="language model for BERTScore (default: that of milan-ray[minilm])"
    )


def job(parser: argparse.ArgumentParser) -> None:
    """Adds the options of long-running subcommands that end with a report: storage, cluster, dry run and the like."""
    add_to(parser, storage, report, plugins, resources, dry_run, common)


def experiment(parser: argparse.ArgumentParser) -> None:
    """Adds the common options of subcommands that run experiments on networks with images."""
    models(parser)
    probe(parser, required=True)
    add_to(parser, download, job)


def dissection(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that dissect models: models, exemplars, downloads, quirks and :func:`job`."""
    add_to(parser, models, exemplars, download, quirks, job)
