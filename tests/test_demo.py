"""The demo, whole: from an empty folder to a report, and the claims that the README makes about it."""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from commands import run_commands

from milan_ray.world.lexicon import concepts_in
from milan_ray.world.networks import planted_concepts

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MILAN_MODELS_DIR": str(folder / "models")}
    command = [sys.executable, "-m", "jobs.demo", "--storage", str(folder / "run"), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of a demo, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


@pytest.fixture(scope="module")
def scores(demo: tuple[Path, str]) -> pl.DataFrame:
    return pl.read_parquet(demo[0] / "scores/**/*.parquet")


def value(scores: pl.DataFrame, experiment: str, metric: str, system: str, column: str = "value") -> float:
    return scores.filter(experiment=experiment, metric=metric, system=system)[column].item()


def test_demo_shows_progress_and_ends_with_a_summary(demo):
    said = demo[1]
    for part in ("networks:", "exemplars:", "encodings:", "descriptions:", "held-out text", "planted units", "report:"):
        assert part in said
    assert "1085 units of 5 networks described" in said
    assert (demo[0] / "report/index.html").is_file()


@pytest.mark.parametrize("system", ["wPMI", "p(d|E)"])
@pytest.mark.parametrize(
    ("experiment", "metric"),
    [("held-out text", "rouge-l-f"), ("held-out truth", "auroc"), ("held-out truth", "causal-drop")],
)
def test_demo_descriptions_of_the_held_out_network_stand_above_trivial_rows(scores, experiment, metric, system):
    low = value(scores, experiment, metric, system, "low")
    for trivial in ("constant", "shuffled"):
        assert low > value(scores, experiment, metric, trivial)


def test_demo_trained_network_explains_more_than_the_untrained_one(scores):
    assert value(scores, "held-out text", "rouge-l-f", "wPMI", "low") > value(
        scores, "held-out text", "rouge-l-f", "random-weights"
    )
    assert value(scores, "held-out truth", "auroc", "wPMI", "low") > value(scores, "untrained truth", "auroc", "wPMI")
    share = "interpretable units", "iou>.04"
    assert value(scores, *share, "trained", "low") > value(scores, *share, "random-weights", "high")


def test_demo_planted_units_are_named(scores):
    named = value(scores, "planted units", "planted-accuracy", "wPMI")
    assert named >= 0.25
    assert named > value(scores, "planted units", "planted-accuracy", "constant")


def test_demo_tuned_lambda_is_on_held_out_units_not_worse_than_none_or_the_papers(demo, scores):
    rows = scores.filter(pl.col("experiment") == "tuning of world by lam")
    metric = "bertscore-f" if "bertscore-f" in rows["metric"] else "rouge-l-f"
    chosen = pl.read_parquet(demo[0] / "trials/*/sweep=lam/*.parquet").filter("chosen", metric=metric, split="held-out")
    others = {"λ = 0", "λ = 0.2"} - {f"λ = {chosen['lam'].item():g}"}
    for other in others:
        difference = rows.filter(pl.col("system").str.ends_with(f" − {other}"), metric=metric)
        assert difference["high"].item() >= 0
    (figure,) = (demo[0] / "report/figures").glob("world-tuned-by-lam-*.svg")
    assert f'src="figures/{figure.name}"' in (demo[0] / "report/index.html").read_text(encoding="utf-8")


def test_demo_parquet_answers_the_readmes_question(demo):
    frame = pl.scan_parquet(f"{demo[0]}/descriptions/**/*.parquet", hive_partitioning=True)
    signs = (
        frame.filter(pl.col("labeler") == "milan", pl.col("description").str.to_lowercase().str.contains("sign"))
        .group_by("model", "layer")
        .agg(pl.len().alias("units"), pl.col("score").max().alias("best"))
        .sort("units", descending=True)
        .collect()
    )
    assert signs["units"].sum() > 10
    assert "world/resnet" in signs["model"].to_list()


def test_demo_again_does_nothing(demo):
    run = demo[0]
    files = [path for path in run.rglob("*.parquet") if "_work" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = run_demo(run.parent, "--no-report")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "training of world: up to date" in again.stderr


SWEEP = "strategies: [beam, rerank]\nbeam_sizes: [5]\nlams: [0, 0.2]\nmetric: rouge-l-f\n"
SMALL = ("analysis", "annotations", "audit", "cut-and-paste")
"""Experiments of the paper that train nothing."""


@pytest.fixture(scope="module")
def afterwards(
    demo: tuple[Path, str], scores: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Verb → standard output of its last command, of all that follow the demo, run by one process one after the other.

    The documents' commands, as they are written but for a shorter sweep, fewer drawn images and one report, that of the
    last; the paper's experiments in small; the demo's dry run. What the demo itself has found is read before.
    """
    documents = runpy.run_path(str(ROOT / "tests/test_documents.py"))
    commands = [
        command for command in documents["TYPED"] if documents["why_not"](command) == [documents["ON_THE_DEMO"]]
    ]
    folder = tmp_path_factory.mktemp("afterwards")
    (folder / "rerank.yaml").write_text(SWEEP)
    places = {"results/demo": str(demo[0]), "tune_configs/rerank.yaml": str(folder / "rerank.yaml")}
    lines = []
    for command in commands:
        line = [functools.reduce(lambda w, place: w.replace(place, places[place]), places, word) for word in command]
        if command[0] == "score" and "--generator" in command:
            line += ["--images", "2"]
        if command is not commands[-1] and "--no-report" in documents["leaf"](command)._option_string_actions:
            line.append("--no-report")
        lines.append(line)
    lines.append(["paper", "--small", "--only", ",".join(SMALL), "--no-report", "--storage", str(demo[0])])
    lines.append(["demo", "--dry-run", "--storage", str(demo[0])])
    environment = {"MILAN_MODELS_DIR": str(demo[0].parent / "models")}
    answers = run_commands(lines, folder / "commands.json", environment)
    return {line[0]: out for line, (out, _) in zip(lines, answers, strict=True)}


def test_demo_that_is_done_has_nothing_to_do(afterwards):
    assert afterwards["demo"].splitlines()[-1].startswith("0 networks and tables would be made, ")


def test_demo_planted_units_are_named_by_describe_and_dissect(demo, afterwards):
    """The whole method offline: captions of a tagger, phrases counted, scenes drawn (docs/describe-and-dissect.md)."""
    labels = pl.read_parquet(demo[0] / "descriptions/labeler=dnd/**/*.parquet").sort("unit")
    assert labels["unit"].to_list() == list(range(len(planted_concepts)))
    named = [
        concept in concepts_in(text) for concept, text in zip(planted_concepts, labels["description"], strict=True)
    ]
    assert sum(named) / len(named) >= 0.2


def test_documents_commands_on_the_demo_run(afterwards):
    assert afterwards.keys() >= {"dnd", "baselines", "label", "score", "compare", "tune", "describe"}


def test_papers_experiments_in_small_write_the_page(demo, afterwards):
    """Sizes of a test: that all hangs together, from the demo's tables to the page; figures mean nothing."""
    claims = pl.read_parquet(demo[0] / "claims/**/*.parquet")
    assert set(claims["experiment"]) == set(SMALL) and claims["small"].all()
    page = (demo[0] / "report/paper/index.html").read_text(encoding="utf-8")
    assert "Sizes of a test" in page and "Not run here yet" in page
    assert all(f'id="{name}"' in page for name in SMALL)
