"""``--dry-run`` of every verb connects to nothing and writes nothing, and reads ``--labels`` and ``--legend``.

A new verb with a dry run fails here until it has a command line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import toy_captioner

from milan_ray import cli
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, Table
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FLAGS, COLOURS = (f"--plugin={PLUGINS / name}.py" for name in ("tiny_models", "flags", "colours"))
PHOTOS = ["--model", "tiny/cnn", "--layers", "2", TINY, "--probe", "{photos}"]
WATCHER = ["--model", "flags/watcher", "--layers", "seen", FLAGS, "--probe", "flags"]
TRAINED = ["--annotations", "people", TINY]

COMMANDS: dict[str, list[str]] = {
    "exemplars": PHOTOS,
    "describe": [*PHOTOS, "--decoder", "toy", "--pooled"],
    "label": [*WATCHER, "--labeler", "netdissect,compexp,clip-dissect", "--clip", "flags/truth"],
    "train": [*TRAINED, "--encoder", "tiny", "--name", "new"],
    "tune": [*TRAINED, "--decoder", "toy", "--config", "{sweep}"],
    "dnd": [
        *["--model", "colours/watcher", COLOURS, "--probe", "colours", "--captioner", "colours/names"],
        *["--llm", "https://example.invalid/v1", "--llm-model", "m", "--generator", "world/painter"],
        *["--scoring", "mean"],
    ],
    "demo": ["--clip", "--generator", "--superposed", "--groups"],
    "score": [*WATCHER, "--clip", "flags/truth", "--generator", "flags/fields"],
    "generalize": [*TRAINED, "--split", "tiny/cnn:tiny/twin", "--encoder", "tiny"],
    "baselines": [*WATCHER, TINY, "--decoder", "toy", "--annotations", "people"],
    "compare": ["--annotations", "people", "--labeler", "milan"],
    "analyze": [*PHOTOS, "--words", "dog"],
    "edit": [*PHOTOS, "--words", "dog", "--test", "{photos}", "--fine-tune", "{photos}", "--out", "{out}"],
    "audit": ["--pair", "tiny/cnn", "tiny/twin", "--words", "red"],
    "effects": PHOTOS,
    "paste": PHOTOS,
    "paper": [],
}
"""Verb → its command line, but for the storage."""

FETCHED: list[list[str]] = [
    ["describe", *PHOTOS, "--milan", "base"],
    ["exemplars", *PHOTOS, "--weights", "http://127.0.0.1/w.pth"],
    ["exemplars", "--model", "resnet18/imagenet", "alexnet/imagenet", "--probe", "{photos}", "--download"],
    ["tune", *TRAINED, "--milan", "base", "--config", "{sweep}"],
    ["baselines", *WATCHER, TINY, "--milan", "base"],
    ["audit", "--milan", "base", *PHOTOS],
    ["train", *TRAINED, "--encoder", "alexnet", "--name", "new", "--download"],
    ["generalize", *TRAINED, "--split", "tiny/cnn:tiny/twin", "--encoder", "alexnet", "--download"],
    ["analyze", "--model", "alexnet/imagenet", "--probe", "{photos}", "--download"],
]
"""Command lines of what is not here and would be fetched."""


def actions(option: str) -> dict[str, argparse.ArgumentParser]:
    """Verbs that have an option."""
    (every,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: verb for name, verb in every.choices.items() if option in verb._option_string_actions}


def put(storage: Storage, table: Table, *rows: dict[str, object], **keys: str) -> None:
    rows = tuple({**keys, **row} for row in rows)
    meta = {"probe": "p", "view": "v", "mask_height": "24", "mask_width": "24"} if table is EXEMPLARS else None
    data = table.table({column.name: [row.get(column.name) for row in rows] for column in table.columns}, meta)
    storage.write(table, data, f"{table.name} {sorted(keys.values())}", **keys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, str]:
    """A run directory with a captioner, and described and annotated networks; and the files that commands name."""
    folder = tmp_path_factory.mktemp("dry")
    storage = Storage(folder / "run")
    label = ["label", *WATCHER, "--labeler", "clip-dissect", "--clip", "flags/truth", "--k", "3", "--no-report"]
    assert cli.main([*label, "--storage", storage.root, "--device", "cpu"]) == 0
    save_captioner(storage, "toy", toy_captioner(length=5, beam_size=6), "A toy.")
    for model, layer, units in (("tiny/cnn", "2", 8), ("tiny/twin", "0", 6)):
        put(storage, EXEMPLARS, model=model, layer=layer)
        texts = [{"unit": unit, "description": "a red dog", "score": 0.0, "n_best": []} for unit in range(units)]
        put(storage, DESCRIPTIONS, *texts, labeler="milan", model=model, layer=layer)
    for model, layer, units in (("tiny/cnn", "2", 8), ("tiny/twin", "0", 6), ("flags/watcher", "seen", 5)):
        said = [{"unit": unit, "annotator": who, "text": "red dogs"} for unit in range(units) for who in "AB"]
        put(storage, ANNOTATIONS, *said, source="people", model=model, layer=layer)
    sweep = "strategies: [rerank]\nbeam_sizes: [2]\nlams: {from: 0, to: 0.2, step: 0.1}\nmetric: rouge-l-f\n"
    (folder / "rerank.yaml").write_text(sweep)
    return {
        "photos": str(photos),
        "run": storage.root,
        "sweep": str(folder / "rerank.yaml"),
        "out": str(folder / "out.pth"),
    }


def line(world: dict[str, str], verb: str, *options: str) -> list[str]:
    return [verb, *(part.format(**world) for part in options), "--storage", world["run"], "--dry-run"]


_WATCHED: list[tuple[str, object]] | None = None
_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.bind", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_EVENTS |= {
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.copyfile",
    "tempfile.mkstemp",
    "tempfile.mkdtemp",
}


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _WATCHED is None:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in _EVENTS or (writes and args[0] != os.devnull):
        _WATCHED.append((event, args[0] if args else None))


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, object]]]:
    """What connects or writes meanwhile, compiled modules aside."""
    global _WATCHED
    if not getattr(sys, "_milan_every_dry_run", False):
        sys.addaudithook(_watch)
        sys._milan_every_dry_run = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _WATCHED = []
    try:
        yield _WATCHED
    finally:
        _WATCHED = None


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_every_verb_with_a_dry_run_has_a_command_line() -> None:
    assert set(COMMANDS) == set(actions("--dry-run"))


def dry(world: dict[str, str], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of a dry run that was seen to connect to nothing and to write nothing."""
    for name in ("MILAN_MODELS_DIR", "MILAN_DATA_DIR", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    before = files(Path(world["run"]).parent)
    with watched(monkeypatch) as seen:
        status = cli.main(command)
    assert seen == [] and files(Path(world["run"]).parent) == before and not list(tmp_path.iterdir())
    return status


@pytest.mark.parametrize("verb", COMMANDS)
def test_dry_runs_of_every_verb_connect_to_nothing_and_write_nothing(
    verb, world, tmp_path, capsys, monkeypatch
) -> None:
    assert dry(world, line(world, verb, *COMMANDS[verb]), tmp_path, monkeypatch) == 0, capsys.readouterr().err
    *steps, closing = capsys.readouterr().out.splitlines()
    assert steps and closing.endswith("; nothing was done.")


@pytest.mark.parametrize("command", FETCHED, ids=lambda command: " ".join(command[:3]))
def test_dry_runs_say_what_would_be_fetched(command, world, tmp_path, capsys, monkeypatch) -> None:
    assert dry(world, line(world, *command), tmp_path, monkeypatch) == 0, capsys.readouterr().err
    wanted = 2 if "alexnet/imagenet" in command and "resnet18/imagenet" in command else 1
    assert capsys.readouterr().out.count("would be fetched from") == wanted  # all of them are named


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for option in ("--labels", "--legend") for verb in COMMANDS
                         if verb in actions(option)]
)  # fmt: skip
def test_every_verb_reads_the_labels_and_the_legend_given(verb, option, world, tmp_path, capsys) -> None:
    options = [world["photos"] if part in ("{photos}", "flags", "colours") else part for part in COMMANDS[verb]]
    if verb == "audit":
        options = [*(part.format(**world) for part in PHOTOS), "--decoder", "toy"]
    assert cli.main(line(world, verb, *options, option, str(tmp_path / "absent.csv"))) == 1
    said = capsys.readouterr().err
    assert "absent.csv" in said or (option == "--legend" and "has no label maps" in said)
