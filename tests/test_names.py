"""Names that become parts of paths: what may be called what, and that nothing is written outside of a storage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from toys import toy_captioner

from milan_ray import cli
from milan_ray.annotations.groups import training_groups
from milan_ray.captioner.encoder import register_encoder
from milan_ray.cli import arguments
from milan_ray.errors import MilanError
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.models.generators import register_generator
from milan_ray.models.image_text import register_image_text
from milan_ray.models.registry import register_model
from milan_ray.models.segmentation import register_segmenter
from milan_ray.names import LONGEST, checked_name
from milan_ray.probe.registry import register_probe
from milan_ray.schema import DESCRIPTIONS, RUNS, TABLES
from milan_ray.stages.annotations_collect import run_answers
from milan_ray.stages.annotations_import import import_csv
from milan_ray.stages.captioners import EncoderRef, has_captioner, load_captioner, save_captioner
from milan_ray.stages.training import TrainingJob
from milan_ray.storage import Storage
from milan_ray.studies.auditing.run import AuditConfig
from milan_ray.studies.comparison.run import find_comparison

ATTACKS = (
    "..", "../x", "../../x", "/abs", "a/../../b", "a/..", "", " ", ".", "./x", "x/", "a//b", "nul\0", "line\nbreak",
    "a\tb", "..\\x", "a\\..\\b", "C:\\x", "%2e%2e", "%2e%2e%2fx", "a%2fb", "a%5cb", "x" * 300, "é" * 120, "dot.",
    "space ", " space", "~", "~root", "~/x", "-rf", "--name", ".hidden", "a\u2028b", "a\u2215b", "\uff0e\uff0e",
    "..\uff0fx", "a\u2044b", "\ud800", "a\u202etxt",
)  # fmt: skip
"""What leads out of a folder, here or elsewhere, or is no name of a file."""

FINE = (
    "base",
    "world-base",
    "v1.2",
    "my faces",
    "λ=0.2",
    "犬",
    "a+b",
    "x" * LONGEST,
    "not-alexnet-imagenet",
    "…and so on",
)
"""What works, and goes on to work."""

WITH_SLASHES = ("resnet18/imagenet", "timm/vit_tiny_patch16_224.augreg_in21k", "world/spurious-0.5")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("slashes", [False, True])
def test_names_that_lead_elsewhere_are_refused_in_one_sentence(name: str, slashes: bool) -> None:
    with pytest.raises(MilanError, match="cannot be called") as error:
        checked_name("the captioner", name, slashes=slashes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", FINE)
def test_ordinary_names_go_on_to_work(name: str) -> None:
    assert checked_name("it", name) == checked_name("it", name, slashes=True) == name


@pytest.mark.parametrize("name", WITH_SLASHES)
def test_names_of_models_may_have_slashes_where_they_are_quoted(name: str) -> None:
    assert checked_name("it", name, slashes=True) == name
    with pytest.raises(MilanError, match="separator"):
        checked_name("it", name)


def _actions(parser: argparse.ArgumentParser, verb: str = "") -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _actions(below, f"{verb} {name}".strip())
        else:
            yield verb, action


GIVEN = (arguments.name, arguments.table_name, arguments.tag)
"""The rule, as options are read by it."""

OWN_FILES = ("FILE", "DIR", "FOLDER", "JSON", "CSV", "SET")
"""How options call files and folders that users choose themselves, wherever they lie."""

NO_NAMES = {
    "--address", "--device", "--image-column", "--label-column", "--llm-model", "--prompt", "--query", "--similarity",
    "--sigmoid", "--scoring", "--split", "--storage", "--suffix", "--url", "--words", "--only", "--families", "query",
}  # fmt: skip
"""Options that never are a part of a path in a storage: words, numbers, choices, and the storage itself."""

LOOKED_UP = {
    "--annotations", "--calibrate", "--captioner", "--clip", "--contrast", "--decoder", "--encoder", "--features",
    "--fine-tune", "--generator", "--group", "--labeler", "--language", "--layer", "--layers", "--llm", "--milan",
    "--model", "--pair", "--plugin", "--probe", "--segmentation", "--semantic", "--source", "--supported-by",
    "--test", "--verdicts-by", "--weights", "--zoo", "model", "name", "other",
}  # fmt: skip
"""Options that name what is there already: registered, in the storage, or a file; what registers it knows the rule."""


def test_every_option_that_takes_a_text_is_known_to_be_a_name_or_none() -> None:
    """A new option belongs into one of the lists: where it becomes part of a path, it is read by the rule."""
    numbers = (
        arguments.amount,
        arguments.count,
        arguments.positive,
        arguments.share,
        arguments.gib,
        arguments.numbers,
        arguments.grid,
        int,
        float,
    )
    unknown = [
        f"{verb} {name}"
        for verb, action in _actions(cli.build_parser())
        if action.nargs != 0 and action.choices is None and action.type not in (*numbers, *GIVEN)
        for name in [action.option_strings[0] if action.option_strings else action.dest]
        if action.metavar not in OWN_FILES and name not in NO_NAMES | LOOKED_UP and name not in ("-h", "--version")
    ]
    assert unknown == []


@pytest.mark.parametrize("name", ["..", "../x", "/abs", "a/../b", "nul\0", "", "x" * 300])
def test_what_plug_ins_register_keeps_the_rule(name: str) -> None:
    for register in (
        lambda: register_model(name, lambda weights: torch.nn.Identity(), ()),
        lambda: register_encoder(name, lambda weights: torch.nn.Identity(), ()),
        lambda: register_image_text(name, lambda: pytest.fail("is not asked for")),
        lambda: register_generator(name, lambda: pytest.fail("is not asked for")),
        lambda: register_segmenter(name, lambda: pytest.fail("is not asked for")),
        lambda: register_probe(name, lambda: pytest.fail("is not asked for")),
    ):
        with pytest.raises(MilanError, match="cannot be called"):
            register()


@pytest.mark.parametrize("name", ["..", "../../x", "/abs", ".hidden", "nul\0", "a/../b"])
def test_layers_called_like_paths_stay_below_their_table(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "a/run")
    keys = {"stage": "s", "run": name, "model": name}
    table = RUNS.table({column.name: [] for column in RUNS.columns})
    storage.write(RUNS, table, "config", **keys)
    assert storage.partitions(RUNS) == [keys]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.is_relative_to(tmp_path / "a/run/runs") and len(file.relative_to(tmp_path).parts) == 7


PLACES = {
    "train --name", "generalize --name", "compare --name", "baselines --name", "audit --name",
    "annotations import --source", "annotations answers --source", "annotations import --model", "dnd --tag",
    "features fit --name",
}  # fmt: skip
"""Options that become parts of paths and are read by the rule; groups have it in their records."""


def test_every_option_that_gives_a_name_is_read_by_the_rule() -> None:
    found = {
        f"{verb} {action.option_strings[0]}": action.type in GIVEN
        for verb, action in _actions(cli.build_parser())
        if action.option_strings and (action.dest in ("name", "source", "tag") or action.type in GIVEN)
    }
    reading = {"annotations export --source", "annotations statistics --source"}
    assert {place for place, checked in found.items() if checked} == PLACES
    assert {place for place, checked in found.items() if not checked} == reading


@pytest.mark.parametrize("name", ["..", "../../x", "/abs", "", "nul\0", "%2e%2e"])
def test_verbs_refuse_a_name_before_anything_starts(name: str, tmp_path: Path, capsys: Any) -> None:
    storage = tmp_path / "a/run"
    for place in sorted(PLACES if name else PLACES - {"dnd --tag"}):
        *verb, option = place.split()
        with pytest.raises(SystemExit) as ended:
            cli.main([*verb, f"{option}={name}", "--storage", str(storage)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "cannot be called" in said and said.count("\n") == 1 and option in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ATTACKS)
def test_python_users_are_refused_the_same_names(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "a/run")
    for use in (
        lambda: TrainingJob(name, "people", (), EncoderRef("tiny")),
        lambda: save_captioner(storage, name, toy_captioner(), "about"),
        lambda: AuditConfig(name),
        lambda: find_comparison(storage, name=name),
        lambda: import_csv(storage, tmp_path / "absent.csv", "m", source=name),
        lambda: run_answers(storage, [], name),
    ):
        with pytest.raises(MilanError, match="cannot be called"):
            use()
    if set(name) & set("/\\%\0\n~") or name == "..":
        with pytest.raises(MilanError, match="cannot be"):
            DescribeAndDissect(tag=name)
    if "/" not in name and name:  # of groups, slashes become hyphens
        with pytest.raises(MilanError, match="cannot be called"):
            training_groups([f"{name}=m"], ["m"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["..", "../../x", "/abs", ".", "", "nul\0", "x" * 300])
def test_what_is_read_by_a_name_stays_in_the_storage(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    storage = Storage(tmp_path / "run/inner")
    for folder in ("run", "."):  # what a way out would find
        (tmp_path / folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "run")
    if "\0" in name or len(name) > 255:
        with pytest.raises(MilanError):
            has_captioner(storage, name)
        return
    assert not has_captioner(storage, name)
    with pytest.raises(MilanError):
        load_captioner(storage, name)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/abs", "a//b", "./a", "a/.", "a/" + "x" * 256, "a\0b", ".."])
def test_a_storage_writes_reads_and_removes_below_its_root_alone(path: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "a/run")
    for use in (
        lambda: storage.put(path, b"x"),
        lambda: storage.get(path),
        lambda: storage.open(path),
        lambda: storage.exists(path),
        lambda: storage.files(path),
        lambda: storage.remove(path),
        lambda: storage.remove_file(path),
        lambda: storage.put_work(path, "piece", pa.table({"a": [1]})),
        lambda: storage.get_work(path, "piece"),
    ):
        with pytest.raises(MilanError, match=r"no place in a storage|longer than"):
            use()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [name for name in ATTACKS if name != "\ud800"])
def test_values_of_partitions_are_one_folder_each_whatever_they_are(value: str, tmp_path: Path) -> None:
    """Names of plug-ins' models, layers and probes: all that fit work, and nothing leaves its folder."""
    storage = Storage(tmp_path / "a/run")
    for table in TABLES:
        path = storage.path(table, **dict.fromkeys(table.partition, value))
        assert path.count("/") == len(table.partition) + 1
        assert Path(storage.root, path).resolve().is_relative_to(tmp_path / "a/run" / table.name)
    keys = {"stage": "s", "run": "r", "model": value}
    row = {**keys, "layer": value, "rows": 1, "images": 1, "skipped": 0, "seconds": 1.0, "images_per_s": 1.0}
    row |= {"finished_at": "2026", "versions": "{}"}
    table = RUNS.table({column.name: [row.get(column.name)] for column in RUNS.columns})
    if len(value.encode()) > 100:
        with pytest.raises(MilanError, match="longer than 255 bytes; choose a shorter one"):
            storage.write(RUNS, table, "c", **keys)
        return
    storage.write(RUNS, table, "c", **keys)
    assert storage.partitions(RUNS) == [keys]
    assert storage.read(RUNS, **keys)["layer"].to_pylist() == [value]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]


def test_layers_and_models_called_like_paths_are_searched_as_ever(tmp_path: Path, capsys: Any) -> None:
    storage = Storage(tmp_path / "run")
    names = ("resnet18/imagenet", "hf//abs/folder", "../../x", "timm/a.b_c.d")
    for model in names:
        keys = {"labeler": "milan", "model": model, "layer": "layer1.0..conv/x"}
        row = {**keys, "unit": 0, "description": "dogs", "score": 0.0, "n_best": []}
        storage.write(
            DESCRIPTIONS, DESCRIPTIONS.table({c.name: [row.get(c.name)] for c in DESCRIPTIONS.columns}), "c", **keys
        )
    assert cli.main(["search", "dog", "--storage", storage.root]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
