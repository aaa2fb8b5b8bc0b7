"""The command line as a user meets it: help, lists, and one clear sentence for everything that can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from milan_ray import cli

PLUGIN = str(Path(__file__).parent / "plugins/tiny_models.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def exemplars(*arguments: str, model: str = "tiny/cnn") -> list[str]:
    return ["exemplars", "--model", model, "--plugin", PLUGIN, "--no-report", *arguments]


def assert_one_sentence(err: str, *parts: str) -> None:
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0], lines[0]


ACTIONS = [*(("annotations", action) for action in ("import", "merge", "export", "clean")), ("features", "fit")]


@pytest.mark.parametrize(
    "verb", [*((verb,) for verb in sorted(cli.VERBS) if verb not in ("annotations", "features")), *ACTIONS]
)
def test_help_of_every_verb_names_every_option(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*verb, "--help"])
    assert exit_.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_every_verb_has_a_job():
    jobs = {path.stem for path in (Path(__file__).parents[1] / "jobs").glob("*.py")} - {"__init__"}
    assert jobs == set(cli.VERBS)


def test_models_lists_models_and_layers(capsys):
    status, out, _ = run(capsys, "models", "--plugin", PLUGIN)
    assert status == 0
    assert {"tiny/cnn", "resnet18/imagenet"} <= set(out.split())
    status, out, _ = run(capsys, "models", "tiny/cnn", "--plugin", PLUGIN)
    assert status == 0
    assert any(line.split()[:5] == ["0", "Conv2d", "6×12×12", "6", "*"] for line in out.splitlines())
    _, out, _ = run(capsys, "models", "tiny/cnn", "--plugin", PLUGIN, "--json")
    assert {"path": "0", "kind": "Conv2d", "shape": [6, 12, 12], "units": 6, "default": True}.items() <= json.loads(
        out.splitlines()[0]
    ).items()


def test_models_with_wrong_name_answers_with_the_nearest(capsys):
    status, _, err = run(capsys, "models", "resnet19/imagenet")
    assert status == 1
    assert_one_sentence(err, "resnet19/imagenet", "resnet18/imagenet")


def test_exemplars_with_empty_folder_fails_clearly(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = exemplars("--probe", str(tmp_path / "empty"), "--storage", str(tmp_path / "run"))
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, str(tmp_path / "empty"))
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_exemplars_with_missing_folder_fails_clearly(capsys, tmp_path):
    arguments = exemplars("--probe", str(tmp_path / "nowhere"), "--storage", str(tmp_path / "run"))
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "nowhere")


def test_exemplars_with_wrong_layer_answers_with_the_nearest(ray_session, capsys, photos, tmp_path):
    arguments = exemplars("--probe", str(photos), "--storage", str(tmp_path / "run"), "--layers", "22")
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "layer '22'", "2")
    assert not list((tmp_path / "run").rglob("exemplars/**/*.parquet"))


def test_exemplars_of_model_without_weights_says_where_they_were_looked_for(ray_session, capsys, photos, tmp_path):
    arguments = exemplars("--probe", str(photos), "--storage", str(tmp_path / "run"), model="tiny/unweighted")
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "/nowhere/w.pth", "--weights")


def test_exemplars_of_torchvision_model_without_weights_names_file_and_url(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    arguments = [
        "exemplars",
        "--model",
        "resnet18/imagenet",
        "--probe",
        str(photos),
        "--storage",
        str(tmp_path / "run"),
    ]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "resnet18-", "https://", str(tmp_path / "models"))


def test_exemplars_with_missing_weights_file_fails_clearly(capsys, photos, tmp_path):
    arguments = exemplars("--probe", str(photos), "--weights", str(tmp_path / "none.pth"))
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "none.pth")


def test_exemplars_into_unwritable_storage_fails_before_any_work(capsys, photos, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    status, _, err = run(capsys, *exemplars("--probe", str(photos), "--storage", str(blocked / "run")))
    assert status == 1
    assert_one_sentence(err, str(blocked), "--storage")


def test_describe_without_captioner_says_where_it_was_looked_for(capsys, photos, tmp_path):
    arguments = exemplars("--probe", str(photos), "--storage", str(tmp_path), "--decoder", "nobody")
    status, _, err = run(capsys, "describe", *arguments[1:])
    assert status == 1
    assert_one_sentence(err, "nobody", "captioners/nobody")


def test_relative_paths_inside_a_submitted_job_are_refused(capsys, photos, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    status, _, err = run(capsys, *exemplars("--probe", str(photos), "--storage", "results"))
    assert status == 1
    assert_one_sentence(err, "--storage", "absolute")
    status, _, err = run(capsys, *exemplars("--probe", os.path.relpath(photos), "--storage", "/tmp/run"))
    assert status == 1
    assert_one_sentence(err, "--probe", "absolute")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        cli.main(exemplars("--probe", str(tmp_path / "nowhere"), "--debug"))


def test_models_with_pattern_lists_those_and_what_lies_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "resnet18/places365.pth").touch()
    status, out, _ = run(capsys, "models", "*/places365")
    assert status == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert list(lines) == [f"{name}/places365" for name in ("alexnet", "resnet152", "resnet18", "vgg16")]
    assert lines["resnet18/places365"] == "5 layers weights here: PLACES365"
    assert lines["vgg16/places365"] == "5 layers weights absent"
    _, out, _ = run(capsys, "models", "*/places365", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [model["here"] for model in told] == [[], [], ["PLACES365"], []] and len(told[0]["layers"]) == 5


def test_models_without_pattern_names_the_families(capsys):
    _, out, _ = run(capsys, "models")
    assert {"timm/…", "hf/…"} <= {line.split()[0] for line in out.splitlines()}


def test_weights_by_published_name_are_looked_for_by_their_file(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    arguments = exemplars("--probe", str(photos), "--weights", "IMAGENET1K_V2", model="resnet50/imagenet")
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert_one_sentence(err, "resnet50-11ad3fa6.pth", "--download")
