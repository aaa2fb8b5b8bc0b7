"""``milan-ray diff``: compares the descriptions of two networks."""

from __future__ import annotations

import argparse
import json

from milan_ray.cli import options
from milan_ray.cli.arguments import flag, integer, string, words
from milan_ray.cli.build_configs import open_storage
from milan_ray.cli.refusals import refuse
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("model", help="the network to start from")
    parser.add_argument("other", help="the one to compare with it: what its units say more often is gained")
    string(parser, "--labeler", "NAME", "whose descriptions to compare", "milan")
    string(parser, "--words", "WORDS", "count only these, as in a search: 'face|person,\"left of\"'", [], type=words)
    flag(parser, "--by-layer", "compare the layers that both have one by one, too")
    integer(parser, "--top", 20, "words and units to print")
    options.storage(parser)
    options.common(parser, json="print JSON, all of it")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.scoring.comparable import same_features
    from milan_ray.scoring.differences import diff_descriptions, store, summary
    from milan_ray.scoring.search import scan_descriptions

    if args.json:
        refuse(args, ["top"], "with --json, which prints all of it,", "leave out --json")
    storage = open_storage(args)
    frame = scan_descriptions(storage, [args.model, args.other], None, [args.labeler])
    same = same_features(storage, args.model, args.other)
    difference = diff_descriptions(frame, args.model, args.other, words=args.words, by_layer=args.by_layer, same=same)
    if args.json:
        print(
            json.dumps(
                {"words": difference.words.to_dicts(), "changes": difference.changes.to_dicts()}, ensure_ascii=False
            )
        )
    else:
        print(summary(difference, args.model, args.other, args.top))
    store(storage, difference, args.labeler, args.model, args.other, args.words)
    say(f"in {storage.uri('differences')} and {storage.uri('changes')}; jobs.report shows it")
    return 0
