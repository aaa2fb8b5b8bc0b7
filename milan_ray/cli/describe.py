"""``milan-ray describe``: describes every unit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.build_configs import (
    absolute,
    cluster,
    encoder_ref,
    exemplar_config,
    find_captioner,
    image_text_ref,
    model_refs,
    open_storage,
    probe_ref,
    read_text,
)
from milan_ray.cli.refusals import DISSECTION, refuse
from milan_ray.cli.summary import close, report_on, say_distinct, show_plan
from milan_ray.errors import MilanError

if TYPE_CHECKING:
    from milan_ray.captioner.captioner import Captioner
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import ShardedStage, TaskStage
    from milan_ray.labelers.clip import Clip
    from milan_ray.stages.captioners import EncoderRef
    from milan_ray.stages.contrasts import ContrastSource
    from milan_ray.stages.descriptions import Search

CONTRAST = ["mu", "clip_gamma", "contrasts", "random_contrasts", "contrast_quantile", "contrast_masks"]
"""Options of contrastive descriptions."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=False)
    options.add_to(
        parser, options.captioner, options.clip, options.contrast, options.search, options.units, options.dissection
    )


def run(args: argparse.Namespace, then: Callable[[Plan], None] | None = None) -> int:
    """Runs the subcommand; returns the exit status.

    Args:
        args: Its options.
        then: Adds the later steps of another subcommand to the plan of a dry run; None adds nothing.
    """
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import run_stages
    from milan_ray.engine.tasks import models_apart
    from milan_ray.labelers.clip import CLIP
    from milan_ray.stages.annotations_export import exemplar_layers
    from milan_ray.stages.captioners import about_captioner, load_captioner
    from milan_ray.stages.descriptions import labelers
    from milan_ray.stages.exemplars import Exemplars

    _check(args)
    storage = open_storage(args)
    clip = _clip(args)
    decoder = find_captioner(args, storage)
    captioner = load_captioner(storage, decoder)
    encoder = encoder_ref(args, captioner.encoder_name, storage, decoder)
    encoder.load()
    search = search_of(args, decoder)
    source = _contrast(args, captioner, search)
    present: Mapping[str, Sequence[str]] = {}
    failed: dict[str, str] = {}
    if args.probe is None:
        present = {name: tuple(exemplar_layers(storage, name, args.layers or None)) for name in args.model}
    else:
        exemplars = Exemplars(model_refs(args), probe_ref(args), exemplar_config(args))

    stages = _stages(args, search, captioner, encoder, clip, source)
    if args.dry_run:
        plan = Plan()
        if args.probe is not None:
            plan.stages(storage, [exemplars])
            present = exemplars.layers
        plan.stages(storage, stages(present))
        if then is not None:
            then(plan)
        return show_plan(args, plan)
    with cluster(args) as resources:
        if args.probe is not None:
            done = exemplars.run(storage, resources)
            present, failed = done.models, dict(done.failed)

        def describe(models: dict[str, Sequence[str]]) -> None:
            run_stages(stages(models), storage, resources)

        present = models_apart(describe, present, failed)
    about = about_captioner(storage, decoder)
    report_on(args, storage, list(present), {"About the descriptions": about} if about else None)
    say_distinct(args, storage, present, CLIP if clip else labelers(captioner, search)[-1].name)
    return close(args, "descriptions", present, failed)


def _stages(
    args: argparse.Namespace,
    search: Search,
    captioner: Captioner,
    encoder: EncoderRef,
    clip: Clip | None,
    source: ContrastSource | None,
) -> Callable[[Mapping[str, Sequence[str]]], Iterator[ShardedStage | TaskStage]]:
    """The stages that describe dissected models, given as model → layers."""
    from milan_ray.stages.contrast_descriptions import contrast_stages
    from milan_ray.stages.descriptions import description_stages
    from milan_ray.stages.encodings import Encodings
    from milan_ray.stages.rerank import contrast_reranking_stages, reranking_stages

    def stages(models: Mapping[str, Sequence[str]]) -> Iterator[ShardedStage | TaskStage]:
        yield Encodings(models, encoder, args.units)
        yield from description_stages(models, search, captioner, args.units)
        if clip is not None:
            yield from reranking_stages(models, search, captioner, clip, args.units)
        if source is not None:
            yield source.images
            yield from contrast_stages(models, search, captioner, encoder, source, args.mu, args.units)
            yield from contrast_reranking_stages(models, search, captioner, clip, source, args.units)

    return stages


def _check(args: argparse.Namespace) -> None:
    """Rejects options that would have no effect; contrasts need pooled activations, which are then made too."""
    if args.probe is None:
        remedy = "give --probe too"
        refuse(args, DISSECTION, "without --probe exemplars are taken as the storage has them, and", remedy)
        refuse(args, ["contrast"], "without --probe, which has the images that do not excite a unit,", remedy)
    if args.contrast is None:
        refuse(args, CONTRAST, "without --contrast", "name a model of images and texts with it")
    args.pooled = args.pooled or args.contrast is not None


def _clip(args: argparse.Namespace) -> Clip | None:
    """Configures re-ranking if ``--clip`` or the suffix ``+clip`` of a captioner's name (removed here) requests it."""
    from milan_ray.labelers.clip import Clip
    from milan_ray.models.image_text import DEFAULT, find_image_text
    from milan_ray.stages.captioners import RERANKED

    for option in ("milan", "decoder"):
        name = getattr(args, option)
        if name is not None and name.endswith(RERANKED) and not Path(name).exists():
            setattr(args, option, name.removesuffix(RERANKED))
            args.clip = args.clip or ""
    if args.clip is None:
        return None
    folder = absolute("--clip", args.clip) if Path(args.clip).parent != Path(".") else args.clip
    gamma = args.clip_gamma or 0.0
    return Clip(find_image_text(folder or DEFAULT), args.clip_z, args.clip_beam_size, args.clip_lam, gamma)


def _contrast(args: argparse.Namespace, captioner: Captioner, search: Search) -> ContrastSource | None:
    """Configures contrastive descriptions if ``--contrast`` requests them.

    Raises:
        MilanError: μ does not fit λ, the model of images and texts is missing, or the probe holds latents.
    """
    from milan_ray.config import ContrastConfig
    from milan_ray.stages.contrast_descriptions import contrastive
    from milan_ray.stages.contrasts import ContrastSource
    from milan_ray.stages.embeddings import ImageEmbeddings

    if args.contrast is None:
        return None
    args.mu = options.MU if args.mu is None else args.mu
    contrastive(captioner, search, args.mu)
    config = ContrastConfig(args.contrasts, args.random_contrasts, args.contrast_quantile)
    images = ImageEmbeddings(image_text_ref(args, "--contrast"), probe_ref(args))
    models = {ref.name: ref for ref in model_refs(args)}
    return ContrastSource(images, models, exemplar_config(args), config, args.contrast_masks)


def search_of(args: argparse.Namespace, decoder: str) -> Search:
    """Configures the search, from the options, or else the setting, or else the captioner's defaults; and sets μ.

    Raises:
        MilanError: The setting was chosen for contrasts, and there are none.
    """
    from milan_ray.captioner.quirks import NO_QUIRKS, REFERENCE
    from milan_ray.stages.descriptions import Search

    search = Search(decoder, args.beam_size, args.length, args.lam, REFERENCE if args.reference_quirks else NO_QUIRKS)
    if args.setting is None:
        return search
    from milan_ray.stages.tuning_statistics import read_setting  # imports polars

    setting = read_setting(read_text("--setting", args.setting), args.setting)
    if setting.mu and getattr(args, "contrast", None) is None and args.lam is None:  # jobs.baselines has no contrasts
        raise MilanError(
            f"{args.setting} has μ = {setting.mu:g}, which was chosen together with its λ: give --contrast MODEL, or "
            "another λ with --lam."
        )
    if setting.mu is not None and getattr(args, "mu", 0.0) is None:
        args.mu = setting.mu
    values = asdict(setting)
    del values["mu"]
    return replace(search, **{name: value for name, value in values.items() if getattr(args, name) is None})
