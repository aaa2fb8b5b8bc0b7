"""All verbs alike: options from a file, quiet and JSON, the closing summary, errors of one sentence."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.cli import arguments
from milan_ray.cli.summary import duration

PLUGIN = str(Path(__file__).parents[1] / "plugins/tiny_models.py")

UNITS = re.compile(
    r"\b(images?|models|pixels|units?|seconds|GiB|share|tokens?|captioners|positions|concepts|formulas|candidates?|actors?|CPUs|GPUs|threads|workers"
    r"|epochs|orders?|runs|crops|requests|dollars|temperature|weight|quantile|seed|words|beam|annotations|rate|features)\b|λ"
)
"""What numbers count or measure: the help of an option that takes one has one of these words."""


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for one in action.choices.values():
            yield from leaves(one)
    if not below:
        yield parser


EVERY = list(leaves(cli.build_parser()))


@pytest.mark.parametrize("parser", EVERY, ids=[parser.prog.removeprefix("milan-ray ") for parser in EVERY])
def test_every_option_has_help_a_default_and_a_unit(parser):
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.dest
        help_ = parser._get_formatter()._expand_help(action) if action.help else ""
        assert len(help_) > 5, name
        if not action.option_strings or action.nargs == 0 or action.required:
            continue
        groups = [group for group in parser._mutually_exclusive_groups if action in group._group_actions]
        if not any(group.required for group in groups):
            assert "default" in help_, f"{name}: {help_}"
        numeric = action.type in (int, float, arguments.positive, arguments.share, arguments.gib)
        assert not numeric or UNITS.search(help_), f"{name}: {help_}"


@pytest.mark.parametrize("parser", EVERY, ids=[parser.prog.removeprefix("milan-ray ") for parser in EVERY])
def test_every_verb_has_what_all_have(parser):
    known = parser._option_string_actions
    assert {"--config", "--quiet", "--json", "--log", "--debug"} <= set(known)


def test_options_of_a_file_are_those_of_the_command_line(tmp_path):
    file = tmp_path / "night.yaml"
    file.write_text(
        "storage: /data/run\nmodel: [a, b]\nprobe: /photos\nk: 7\nbeam_size: 20\nmilan: base\npooled: true\n"
        "download: false\nplugin: [x, y]\nunits: [1, 5-7]\nreport:\n"
    )
    args = cli.build_parser().read(["describe", "--config", str(file)])
    assert (args.storage, args.model, args.probe, args.k, args.beam_size) == (
        "/data/run",
        ["a", "b"],
        ["/photos"],
        7,
        20,
    )
    assert (args.pooled, args.download, args.plugin, args.units, args.report) == (
        True,
        False,
        ["x", "y"],
        (1, 5, 6, 7),
        None,
    )
    given = ["--decoder", "mine", "--zoo", "c", "--plugin", "z", "--k", "3"]
    args = cli.build_parser().read(["describe", *given, f"--config={file}"])
    assert (args.decoder, args.milan, args.model, args.plugin, args.k, args.beam_size) == (
        "mine",
        None,
        ["c"],
        ["z"],
        3,
        20,
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("probes: /photos", "unknown option in {file}: 'probes'; nearest: probe"),
        ("- a\n- b", "must hold lines of the form 'option: value'"),
        ("a: [", "is not YAML"),
        ("pooled: perhaps", "pooled in {file} is true or false, not 'perhaps'"),
        ("k: {from: 1}", "k in {file} is {{'from': 1}}; give what --k takes"),
        ("config: other.yaml", "unknown option in {file}: 'config'"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(text, says, tmp_path, capsys):
    file = tmp_path / "night.yaml"
    file.write_text(text)
    assert cli.main(["exemplars", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says.format(file=file) in line


def test_values_of_a_file_are_checked_like_those_of_the_command_line(tmp_path, capsys):
    file = tmp_path / "night.yaml"
    file.write_text("model: a\nprobe: b\nk: 0\n")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["exemplars", "--config", str(file)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --k" in line and "exemplars --help" in line
    assert cli.main(["exemplars", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_the_file_of_tune_holds_options_and_what_to_try(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("annotations: people\nstorage: /data/run\nbeam_sizes: [5, 10]\nlams: [0.1]\n")
    args = cli.build_parser().read(["tune", "--config", str(file)])
    assert (args.annotations, args.storage) == ("people", "/data/run")
    assert args.rest == {"beam_sizes": [5, 10], "lams": [0.1]}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["search", "faces", "--storge", "x"], "unknown option '--storge'; nearest: --storage"),
        (["serch", "faces"], "unknown verb 'serch'; nearest: search"),
        (["annotations", "imprt"], "unknown action 'imprt'; nearest: import"),
        (["score"], "--probe"),
        ([], "VERB"),
        (["status", "what"], "what is 'what'?"),
        (["search", "faces", "--top", "many"], "'many'"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_sentence(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and says in line and "--help" in line


def test_options_are_written_out(capsys):
    with pytest.raises(SystemExit):
        cli.main(["status", "--stor", "x"])
    assert "nearest: --storage" in capsys.readouterr().err


def planned(photos: Path, run: Path, *more: str) -> list[str]:
    source = ["--model", "tiny/cnn", "--plugin", PLUGIN, "--probe", str(photos), "--storage", str(run)]
    return ["exemplars", *source, "--dry-run", *more]


def test_a_plan_is_text_or_json(photos, tmp_path, capsys):
    assert cli.main(planned(photos, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "3 tables would be made, 0 are up to date; nothing was done." and err == ""
    assert cli.main(planned(photos, tmp_path, "--json", "--quiet")) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and (told["verb"], told["status"], told["exit"]) == ("exemplars", "done", 0)
    assert [step["table"] for step in told["planned"]] == ["exemplars"] * 3 and told["storage"] == str(tmp_path)


def test_a_job_ends_with_what_where_how_long_and_what_was_skipped(photos, tmp_path, capsys):
    command = planned(photos, tmp_path, "--layers", "0", "--k", "3", "--no-report", "--batch-size", "64")
    command.remove("--dry-run")
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["layers"] == {"tiny/cnn": ["0"]} and told["skipped"] == {} and told["what"] == "1 layers of 1 models"
    assert re.fullmatch(rf"exemplars: 1 layers of 1 models in \d+ s, in {tmp_path}", err.splitlines()[-1])
    with_broken = [*command[:3], "tiny/unweighted", *command[3:], "--quiet", "--json"]
    assert cli.main(with_broken) == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["status"], list(told["skipped"])) == ("partly", ["tiny/unweighted"])
    assert "skipped tiny/unweighted: " in err and "Traceback" not in err


def test_errors_are_told_to_programs_too(tmp_path, capsys):
    assert cli.main(["search", "faces", "--storage", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["status"] == "failed" and err == f"error: {told['error']}\n"


def test_quiet_leaves_errors_and_results(tmp_path, capsys):
    assert cli.main(["status", "--storage", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["report", "--storage", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert "MILAN_QUIET" not in os.environ


DEFECT = """
import sys
from milan_ray import cli
def broken(args):
    raise ZeroDivisionError("of ours")
summary, add, _ = cli.VERBS["status"]
cli.VERBS["status"] = (summary, add, broken)
sys.exit(cli.main(["status", *sys.argv[1:]]))
"""


def test_what_should_never_happen_is_one_sentence_with_the_tracebacks_file(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", DEFECT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ZeroDivisionError: of ours; this should not happen")
    (file,) = tmp_path.glob("milan-ray-*.txt")
    assert str(file) in line and "in broken" in file.read_text()
    debugged = subprocess.run([*command, "--debug"], capture_output=True, text=True, env=environment, check=False)
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr


def test_durations_are_as_people_say_them():
    assert [duration(seconds) for seconds in (0.2, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_the_documentations_example_is_understood(tmp_path):
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "night.yaml"
    file.write_text(example)
    args = cli.build_parser().read(["describe", "--config", str(file), "--model", "alexnet/imagenet", "--dry-run"])
    assert (args.model, args.milan, args.beam_size, args.pooled) == (["alexnet/imagenet"], "base", 20, True)


def test_config_is_read_as_it_is_written(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("k: 3\nmodel: tiny/cnn\nk: 5\n")
    assert cli.main(["exemplars", "--config", str(file)]) == 2
    assert "'k' stands there twice" in capsys.readouterr().err
    file.write_text("k: 012\nquantile: .5\nprobe: 2020-01-02\nstorage: 0x10\nmodel: tiny/cnn\n")
    args = cli.build_parser().read(["exemplars", "--config", str(file)])
    assert args.k == 12 and args.quantile == 0.5 and args.storage == "0x10" and args.probe == ["2020-01-02"]
    file.write_text("weights: 1:30\nmodel: m\nprobe: p\n")
    assert cli.build_parser().read(["exemplars", "--config", str(file)]).weights == "1:30"


@pytest.mark.parametrize("option", ["--gpus-per-actor=nan", "--gpus-per-actor=-1", "--device=tpu", "--device=cuda:x"])
def test_devices_that_are_none_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().read(["exemplars", "--model", "tiny/cnn", option])
    assert option.partition("=")[2] in capsys.readouterr().err
