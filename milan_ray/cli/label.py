"""``milan-ray label``: labels every unit without a captioner, from the probe's concept maps or a list of concepts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import amount, choice, fraction, integer, names, number, string
from milan_ray.cli.build_configs import cluster, exemplar_config, image_text_ref, opened, read_text
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import close, report_on, show_plan
from milan_ray.config import ContrastConfig
from milan_ray.errors import MilanError

if TYPE_CHECKING:
    from milan_ray.labelers.clip_dissect import ClipDissect
    from milan_ray.stages.concept_labels import LabelConfig


CONTRASTS = ["contrasts", "random_contrasts", "contrast_quantile"]
"""Options on which contrasts are chosen."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("labels from concept maps")
    string(
        group,
        "--labeler",
        "NAMES",
        "netdissect (one concept per unit), compexp (a formula of concepts), clip-dissect (one of a list of "
        "concepts, by a model of images and texts), or several",
        "netdissect,compexp",
        type=names,
    )
    string(group, "--legend", "FILE", "names of the numbers in a folder's label maps: lines of `number name`")
    string(
        group,
        "--segmentation",
        "MODEL",
        "network for semantic segmentation that says what pixels show: a folder as transformers saves it, the name of "
        "one in $MILAN_MODELS_DIR, or a plug-in's (default: the probe's own label maps)",
    )
    integer(group, "--grid", None, "count on N × N positions (default: about 56, or a small view's own)")
    integer(group, "--formula-beam-size", 5, "formulas kept per round")
    integer(group, "--formula-length", 3, "concepts in a formula at most")
    group = parser.add_argument_group("labels from a list of concepts (clip-dissect)")
    string(group, "--clip", "MODEL", "CLIP or SigLIP: a folder, or the name of one in $MILAN_MODELS_DIR")
    string(
        group,
        "--concepts",
        "FILE",
        "one concept per line, or photos/everyday (default: the model's own, concepts.txt in its folder)",
    )
    string(
        group,
        "--similarity",
        "NAME",
        "soft_wpmi, wpmi, rank_reorder, cos_similarity, cos_similarity_cubed",
        "soft_wpmi",
    )
    choice(group, "--pooling", ("mean", "max"), "value of a unit's map of an image", "mean")
    fraction(
        group, "--hold-out", 0.0, "share of the probe's images left out, so that jobs.score --held-out can use them"
    )
    number(
        group,
        "--mu",
        None,
        "subtract N times the similarity to images like the unit's exemplars that do not excite it, as labeler "
        "clip-dissect-contrast; for soft_wpmi and wpmi (default: none)",
        kind=amount,
    )
    options.contrasts(group)
    options.add_to(parser, options.units, options.dissection)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine import references
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import RunnableStage, run_stages
    from milan_ray.engine.tasks import models_apart
    from milan_ray.stages.clip_dissect import clip_dissect_stages
    from milan_ray.stages.concept_labels import ConceptLabels, check_concepts
    from milan_ray.stages.contrasts import ContrastSource
    from milan_ray.stages.embeddings import ImageEmbeddings
    from milan_ray.stages.exemplars import Exemplars

    how, dissect = _labelers(args)
    storage, models, probe = opened(args)
    if how.labelers:
        source = references.probe(probe)
        check_concepts(source, source.manifest())
    judge = None if dissect is None else image_text_ref(args)
    args.pooled = args.pooled or dissect is not None
    config = exemplar_config(args)
    exemplars = Exemplars(models, probe, config)
    contrasts = None
    if dissect is not None and judge is not None and dissect.mu:
        chosen = ContrastConfig(args.contrasts, args.random_contrasts, args.contrast_quantile)
        contrasts = ContrastSource(ImageEmbeddings(judge, probe), {ref.name: ref for ref in models}, config, chosen)

    def by_concept_maps(layers: Mapping[str, Sequence[str]]) -> ConceptLabels:
        return ConceptLabels(layers, models, probe, config, how, args.units)

    def by_concepts(layers: Mapping[str, Sequence[str]]) -> list[RunnableStage]:
        if dissect is None or judge is None:
            return []
        return clip_dissect_stages(layers, probe, dissect, judge, args.units, contrasts)

    if args.dry_run:
        plan = Plan.of(storage, [exemplars])
        plan.stages(storage, [by_concept_maps(exemplars.layers), *by_concepts(exemplars.layers)])
        return show_plan(args, plan)
    with cluster(args) as resources:
        done = exemplars.run(storage, resources)
        failed = dict(done.failed)
        if how.labelers:
            failed |= by_concept_maps(done.models).run(storage, resources)

        def label(left: Mapping[str, Sequence[str]]) -> None:
            run_stages(by_concepts(left), storage, resources)

        models_apart(label, done.models, failed)
    labelled = {name: layers for name, layers in done.models.items() if name not in failed}
    report_on(args, storage, list(done.models))
    return close(args, "labels", labelled, failed)


def _labelers(args: argparse.Namespace) -> tuple[LabelConfig, ClipDissect | None]:
    """Configures the labelers: those that compare with concept maps, and CLIP-Dissect."""
    from milan_ray.errors import unknown_name
    from milan_ray.labelers.clip_dissect import CLIP_DISSECT
    from milan_ray.labelers.compexp import CompExp
    from milan_ray.labelers.netdissect import NetDissect
    from milan_ray.stages.concept_labels import ConceptLabeler, LabelConfig

    composed = CompExp(args.formula_beam_size, args.formula_length)
    known: dict[str, ConceptLabeler] = {NetDissect.name: NetDissect(), CompExp.name: composed}
    names = [*known, CLIP_DISSECT]
    for name in args.labeler:
        if name not in names:
            raise unknown_name("labeler", name, names, f"--labeler takes {', '.join(names)}.")
    for labelers, own in (
        ([CompExp.name], ["formula_beam_size", "formula_length"]),
        (list(known), ["legend", "segmentation", "grid"]),
        ([CLIP_DISSECT], ["clip", "concepts", "similarity", "pooling", "hold_out", "mu", *CONTRASTS]),
    ):
        if not set(labelers) & set(args.labeler):
            refuse(args, own, f"without --labeler {' or '.join(labelers)}", "add that labeler")
    if not args.mu:
        refuse(args, CONTRASTS, "without --mu", "give --mu too")
    if args.segmentation is not None:
        refuse(args, ["legend"], "with --segmentation, which says itself what pixels show,", "leave out --segmentation")
    chosen = tuple(labeler for name, labeler in known.items() if name in args.labeler)
    grid = args.grid and (args.grid, args.grid)
    return LabelConfig(chosen, grid), _clip_dissect(args) if CLIP_DISSECT in args.labeler else None


def _clip_dissect(args: argparse.Namespace) -> ClipDissect:
    """Configures CLIP-Dissect: the list of concepts, and the similarity function.

    Raises:
        MilanError: There is no list of concepts.
    """
    from milan_ray.labelers.clip_dissect import ClipDissect, read_concepts
    from milan_ray.models.concepts import CONCEPT_LISTS, concept_list
    from milan_ray.models.image_text import CONCEPTS_FILE, own_concepts

    how = args.similarity, args.pooling, args.hold_out, args.mu or 0.0
    if args.concepts in CONCEPT_LISTS:
        return ClipDissect(concept_list(args.concepts), *how)
    if args.concepts is not None:
        text = read_text("--concepts", args.concepts, "a text file with one concept per line")
    else:
        folder = image_text_ref(args).folder
        text = "\n".join(own_concepts(folder))
        if not text:
            raise MilanError(f"give a file with one concept per line with --concepts; {folder} has no {CONCEPTS_FILE}.")
    return ClipDissect(read_concepts(text), *how)
