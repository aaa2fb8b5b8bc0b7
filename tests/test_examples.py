"""Every example runs as it stands and finds what it is about; the notebook's stored outputs are those of its cells."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
slow = pytest.mark.slow

LINES = {
    "concept_labels": "units about red: [0]",
    "custom_probe": "unit 1: ['stripes:/90°', 'stripes:/85°', 'stripes:/95°']",
    "describe_units": "4 units described; unit 0: ",
    "dissect_network": "24 units respond to an image; ",
    "read_tables": "units per layer: {'0': 8, '2': 12}",
}
"""A line that each example prints, or how it begins."""

ELSEWHERE = {
    "cifar_resnets", "label_maps", "own_text", "picture_of_units", "superposition", "unseen_networks", "verdicts",
}  # fmt: skip
"""A plug-in that is no program, and programs that need files or descriptions: tests/examples has a test of each."""

LONG = {"concept_labels", "custom_probe", "describe_units", "dissect_network"}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LINES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", [pytest.param(name, marks=[slow] * (name in LONG)) for name in LINES])
def test_example_runs_and_prints_what_it_finds(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert any(line.startswith(LINES[name]) for line in run.stdout.splitlines()), run.stdout


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_has_the_outputs_of_its_cells() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width > 300 for picture in pictures)
    assert any("training accuracy" in "".join(output.get("text", "")) for output in outputs)
    assert any("activation" in "".join(output.get("data", {}).get("text/plain", "")) for output in outputs)


def test_notebook_cells_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells()):
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            names["shown"] = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), f"cell {number}", "exec"), names)
    assert names["accuracy"] > 0.3
    assert names["picture"].width > 300
    assert set(names["dissection"].layers) == {"0", "2"}
