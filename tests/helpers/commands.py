"""Run by a test: command lines, one after the other, in one process with one Ray.

``python commands.py FILE`` reads a JSON list of command lines, runs each as ``milan-ray`` does, up to the first that
fails, and puts a list of (exit status, standard output, standard error) in the file's place.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_commands(lines: Sequence[Sequence[str]], file: Path, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Runs command lines in a process of their own; none may fail.

    Args:
        lines: The command lines, without the program's name.
        file: A file that is not there yet, for lines and answers.
        environment: Variables beside those of this process.

    Returns:
        (standard output, standard error) of each.

    Raises:
        AssertionError: A command ended with another status than 0.
    """
    file.write_text(json.dumps([list(line) for line in lines]))
    own = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    own.pop("RAY_ADDRESS", None)
    command = [sys.executable, __file__, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(file.read_text())
    for line, (status, _, said) in zip(lines, answers, strict=False):
        assert status == 0, (line, said)
    assert len(answers) == len(lines)
    return [(out, said) for _, out, said in answers]


def main(file: str) -> None:
    """Runs them."""
    from milan_ray import cli, runtime

    runtime.prepare(None)
    from milan_ray.config import Resources
    from milan_ray.engine.cluster import connected

    answers: list[tuple[int, str, str]] = []
    with connected(Resources()):
        for line in json.loads(Path(file).read_text()):
            out, said = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
                status = cli.main(line)
            answers.append((status, out.getvalue(), said.getvalue()))
            if status:
                break
    Path(file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
