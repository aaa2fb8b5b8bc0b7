"""``milan-ray dnd``: labels every unit with Describe-and-Dissect."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import choice, integer, number, string, tag
from milan_ray.cli.build_configs import absolute, cluster, exemplar_config, image_text_ref, opened
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import close, report_on, show_plan
from milan_ray.errors import MilanError

if TYPE_CHECKING:
    from milan_ray.engine.stage import RunnableStage
    from milan_ray.stages.dnd.config import DndConfig

CAPTIONER = "blip-image-captioning-base"
GENERATOR = "diffusers/stable-diffusion-v1-5"
PROBE = "probe"
"""In place of a generator: finds images in the probe. It is the default tag, too."""

EMBEDDER = "clip-vit-base-patch16"
"""Default embedder, a folder in $MILAN_MODELS_DIR."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("captions, candidates, drawn images (docs/describe-and-dissect.md)")
    string(
        group,
        "--captioner",
        "MODEL",
        "what captions images: a BLIP folder, the name of one in $MILAN_MODELS_DIR, a registered one such as "
        "photos/classes, or milan/NAME, a captioner of units in the storage or its folder",
        CAPTIONER,
    )
    string(
        group,
        "--llm",
        "MODEL",
        "what finds what captions share: a language model's folder, its name in $MILAN_MODELS_DIR, smollm2, a small "
        "one that pip installs, the address of "
        "a server that speaks OpenAI's protocol (https://…/v1; key in $MILAN_LLM_KEY or $OPENAI_API_KEY), or "
        "'frequent', which counts phrases",
        required=True,
    )
    string(
        group,
        "--generator",
        "MODEL",
        "generator: diffusers/FOLDER (#N for N steps), a registered one, or 'probe', which draws nothing and takes the "
        "probe images that fit a candidate best, by --clip",
        GENERATOR,
    )
    string(group, "--scoring", "NAME", "mean, topk-squared-mean, image-products or topk-compare", "topk-compare")
    string(
        group, "--clip", "MODEL", f"CLIP or SigLIP that compares images: a folder, or its name (default: {EMBEDDER})"
    )
    about = "tells several ways apart: the labeler is dnd-TAG (default with --generator probe: probe)"
    string(group, "--tag", "TAG", about, "", type=tag)
    integer(group, "--top", 10, "images and crops per unit")
    integer(group, "--crops", 4, "attention crops per image at most; 0 for none", least=None)
    choice(group, "--pooling", ("mean", "max"), "value of a unit's map of an image; max for signed maps", "mean")
    integer(group, "--drawn", 10, "images drawn, or found, per candidate")
    string(group, "--prompt", "TEXT", "prompt of the generator; {} is the candidate", "a realistic photograph of {}")
    integer(group, "--seed", 0, "seed of the drawn images", least=0)
    _add_language_model(parser)
    options.add_to(parser, options.units, options.dissection)


def _add_language_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("language model")
    number(group, "--llm-temperature", 0.3, "temperature of its answers")
    string(group, "--llm-model", "NAME", "the model's name on the server")
    number(group, "--llm-per-minute", 300.0, "requests per minute at most")
    group.add_argument(
        "--llm-prices",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("IN", "OUT"),
        help="US dollars per million tokens of questions and of answers",
    )
    number(group, "--llm-budget", None, "what this run may cost at most, US dollars, at these prices")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.stages.dnd.config import FREQUENT, drawings_identity
    from milan_ray.stages.dnd.stage import dnd_stages, run_dnd
    from milan_ray.stages.exemplars import Exemplars

    for server, names in (
        (args.llm != FREQUENT, ["llm_temperature"]),
        ("://" in args.llm, ["llm_model", "llm_per_minute", "llm_prices", "llm_budget"]),
    ):
        if not server:
            refuse(
                args,
                names,
                f"with --llm {args.llm}",
                "name a server (https://…/v1)" if len(names) > 1 else "name a language model",
            )
    if args.generator == PROBE:
        refuse(args, ["prompt", "seed"], "with --generator probe, which draws nothing,", "name a generator")
    if not any(args.llm_prices):
        refuse(args, ["llm_budget"], "without --llm-prices every answer costs nothing, and", "give --llm-prices too")
    args.pooled = True  # source of the images with the highest mean activation
    storage, models, probe = opened(args)
    config, how = exemplar_config(args), _config(args)
    exemplars = Exemplars(models, probe, config)
    identity = drawings_identity(storage, how)  # detects missing inputs before anything starts

    def stages(layers: Mapping[str, Sequence[str]]) -> dict[str, list[RunnableStage]]:
        return dnd_stages(models, layers, probe, config, how, identity, args.units)

    if args.dry_run:
        plan = Plan.of(storage, [exemplars])
        for of_model in stages(exemplars.layers).values():
            plan.stages(storage, of_model)
        return show_plan(args, plan)
    with cluster(args) as resources:
        done = exemplars.run(storage, resources)
        failed = run_dnd(storage, stages(done.models), resources)
    labelled = {name: layers for name, layers in done.models.items() if name not in failed}
    report_on(args, storage, list(done.models))
    return close(args, "labels", labelled, {**done.failed, **failed})


def _config(args: argparse.Namespace) -> DndConfig:
    from milan_ray.labelers.dnd.labeler import DescribeAndDissect
    from milan_ray.models.chat import Limits
    from milan_ray.models.diffusion import PREFIX
    from milan_ray.models.generators import GeneratorRef
    from milan_ray.models.image_captions import ImageCaptionerRef
    from milan_ray.stages.dnd.config import DndConfig, SummariserRef

    if args.crops < 0 or args.llm_per_minute <= 0 or args.llm_temperature < 0:
        raise MilanError("--crops and --llm-temperature take 0 or more, --llm-per-minute more than 0.")
    found = args.generator == PROBE
    labeler = DescribeAndDissect(args.scoring, args.tag or (PROBE if found else ""))
    args.clip = args.clip or (EMBEDDER if labeler.compares or found else None)
    generator = args.generator
    if generator.startswith(PREFIX):
        generator = PREFIX + _place("--generator", generator.removeprefix(PREFIX))
    input_price, output_price = args.llm_prices
    limits = Limits(args.llm_per_minute, input_price=input_price, output_price=output_price, budget=args.llm_budget)
    summariser = SummariserRef(_place("--llm", args.llm), args.llm_model, args.llm_temperature, limits)
    return DndConfig(
        labeler,
        ImageCaptionerRef(_place("--captioner", args.captioner)),
        summariser,
        None if found else GeneratorRef(generator),
        None if args.clip is None else image_text_ref(args),
        *(args.top, args.crops, args.pooling, args.drawn, args.prompt, args.seed, tuple(args.plugin)),
    )


def _place(option: str, name: str) -> str:
    """Converts a folder to a path that every process of the job can use; plain and registered names are unchanged."""
    return absolute(option, name) if Path(name).expanduser().is_absolute() or name.startswith((".", "~")) else name
