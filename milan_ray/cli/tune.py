"""``milan-ray tune``: tunes λ, beam size and strategy, or the training of a decoder."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from milan_ray.cli import options
from milan_ray.cli.arguments import string, strings
from milan_ray.cli.build_configs import absolute, annotated_layers, cluster, encoder_ref, find_captioner, open_storage
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note, show_plan
from milan_ray.errors import MilanError

if TYPE_CHECKING:
    from milan_ray.stages.decoder_search import DecoderTuning
    from milan_ray.stages.encodings import Encodings
    from milan_ray.stages.tuning import Tuning
    from milan_ray.storage import Storage


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.set_defaults(rest={})  # the search space: entries of the --config file that are no options
    string(parser, "--annotations", "SOURCE", "source of the annotations that judge", required=True)
    strings(
        parser, "--model", "NAME", "only annotated units of these models, best ones new to the captioner (default: all)"
    )
    string(parser, "--bert-model", "DIR", "language model of BERTScore (default: MiniLM, where it is installed)")
    options.captioner(parser, required=False)  # decoder.yaml tunes the training of a captioner
    options.add_to(parser, options.download, options.stages)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import run_stages
    from milan_ray.stages.decoder_space import tunes_decoder

    storage = open_storage(args)
    if args.config is None:
        raise MilanError("what to try: give a file with --config, such as tune_configs/rerank.yaml.")
    text = yaml.safe_dump(args.rest)
    encodings, tuning, tuned = (_decoder_tuning if tunes_decoder(text) else _tuning)(args, storage, text)
    if args.dry_run:
        return show_plan(args, Plan.of(storage, [*encodings, tuning]))
    with cluster(args) as resources:
        run_stages(encodings, storage, resources)
        setting = tuning.run(storage, resources)
    note(args, f"{tuned} tuned", setting=asdict(setting))
    return 0


def _tuning(args: argparse.Namespace, storage: Storage, text: str) -> tuple[list[Encodings], Tuning, str]:
    """Builds the stages that tune how a captioner decodes; also returns the captioner's name."""
    from milan_ray.engine.stage import pairs
    from milan_ray.scoring.text import minilm_directory
    from milan_ray.stages.captioners import load_captioner
    from milan_ray.stages.encodings import Encodings
    from milan_ray.stages.tuning import Tuning
    from milan_ray.stages.tuning_statistics import read_sweep
    from milan_ray.stages.tuning_trial import TuningJob

    if args.decoder is None and args.milan is None:
        raise MilanError(f"{args.config} tunes how a captioner decodes: give --decoder or --milan.")
    sweep = read_sweep(text, args.config)
    decoder = find_captioner(args, storage)
    models = annotated_layers(storage, args.annotations, args.model)
    minilm = minilm_directory()
    bert_model = absolute("--bert-model", args.bert_model or str(minilm)) if args.bert_model or minilm else None
    job = TuningJob(Path(args.config).stem, decoder, args.annotations, tuple(pairs(models)), sweep, bert_model)
    encoder = encoder_ref(args, load_captioner(storage, decoder).encoder_name, storage, decoder)
    return [Encodings(models, encoder)], Tuning(job), decoder


def _decoder_tuning(
    args: argparse.Namespace, storage: Storage, text: str
) -> tuple[list[Encodings], DecoderTuning, str]:
    """Builds the stages that tune how a decoder is trained."""
    from milan_ray.engine.stage import pairs
    from milan_ray.stages.decoder_search import DecoderTuning, DecoderTuningJob
    from milan_ray.stages.decoder_space import read_decoder_space
    from milan_ray.stages.encodings import Encodings

    if args.decoder or args.milan:
        raise MilanError(f"{args.config} tunes how a decoder is trained: leave out --decoder and --milan.")
    refuse(args, ["bert_model"], f"with {args.config}, which tunes how a decoder is trained,", "tune a captioner")
    space = read_decoder_space(text, args.config)
    if args.encoder_weights and len(space.encoders) > 1:
        raise MilanError(f"--encoder-weights is for one encoder, and {args.config} has {', '.join(space.encoders)}.")
    models = annotated_layers(storage, args.annotations, args.model)
    job = DecoderTuningJob(Path(args.config).stem, args.annotations, tuple(pairs(models)), space)
    encodings = [Encodings(models, encoder_ref(args, name)) for name in space.encoders]
    return encodings, DecoderTuning(job), "decoder"
