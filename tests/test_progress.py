"""Progress: a line now and then in a log, a bar in a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from milan_ray import progress
from milan_ray.progress import Progress, say, speaking

SCRIPT = """
from milan_ray.progress import Progress
with Progress("exemplars", 5, "images") as progress:
    progress.advance(2)
    progress.advance(3)
"""


def test_progress_in_a_log_ends_with_one_line_of_all_that_was_done(capsys):
    with Progress("exemplars", 5, "images") as bar:
        bar.advance()
        bar.advance(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"  exemplars: 4/5 images in 0 s\n", err)


def test_progress_in_a_log_prints_a_line_at_most_every_interval(capsys, monkeypatch):
    with Progress("exemplars", 9, "images") as bar:
        for _ in range(5):
            bar.advance()
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
        bar.advance()
        assert capsys.readouterr().err == "  exemplars: 6/9 images in 0 s\n"


def test_progress_of_failed_work_does_not_claim_an_end(capsys):
    with pytest.raises(RuntimeError, match="broken"), Progress("exemplars", 5, "images") as bar:
        bar.advance()
        raise RuntimeError("broken")
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal_is_a_bar():
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # how Linux says that nobody has the terminal open any more
        pass
    os.close(main)
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert b"exemplars: 100%" in shown
    assert b"5/5" in shown


def test_progress_without_standard_error_open_to_a_terminal_is_plain_text():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "  exemplars: 5/5 images in 0 s\n"


def test_say_writes_to_standard_error_alone(capsys):
    say("λ = 0.2")
    assert capsys.readouterr() == ("", "λ = 0.2\n")


def test_quiet_leaves_warnings_and_errors_and_no_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with speaking(None, True):
        say("done")
        say("skipped a: broken", level="warning")
        with Progress("views", 5, "images") as bar:
            bar.advance(5)
    assert capsys.readouterr().err == "skipped a: broken\n"
    assert "MILAN_QUIET" not in os.environ


def test_what_is_said_beside_a_bar_is_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("views", 2, "images") as bar:
        say("one image is unreadable")
        bar.advance(2)
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert "one image is unreadable" in lines
    assert any(line.startswith("views: 100%") and "2/2" in line for line in lines)


NOTEBOOK = """
import sys, types
from milan_ray.progress import Progress
class Shell:  # what a kernel leaves in IPython; it is not installed here
    kernel = object()
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=Shell)
with Progress("exemplars", 5, "images") as progress:
    progress.advance(5)
"""


def test_progress_in_a_notebook_is_a_bar_of_text():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=True)
    assert "exemplars: 100%" in done.stderr and max(map(len, re.split(r"[\r\n]+", done.stderr))) <= 100


def test_progress_of_pieces_tells_models_and_layers_that_are_through(capsys):
    pieces = [("a", "0"), ("a", "0"), ("a", "2"), ("b", "0")]
    with Progress("encodings", 3, "blocks", pieces) as bar:
        bar.advance(1, [("a", "0"), ("b", "0")])
        bar.advance(1, [("a", "2")])
    assert capsys.readouterr().err.endswith("2/3 blocks in 0 s (1/2 models, 2/3 layers)\n")


def test_log_as_json_is_an_object_per_line_with_what_programs_want(capsys, monkeypatch):
    monkeypatch.setenv("MILAN_LOG", "json")
    with Progress('views "a"', 5, "images") as bar:
        bar.advance(5)
    say("done\nat last", layers=3)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["stage"], first["done"], first["total"], first["unit"]) == ('views "a"', 5, 5, "images")
    assert first["message"] == 'views "a": 5/5 images in 0 s' and first["level"] == "info"
    assert second["message"] == "done\nat last" and second["layers"] == 3 and second["time"].endswith("+00:00")


def test_log_as_json_says_errors_too_and_shows_no_bar_in_a_terminal(capsys, monkeypatch, tmp_path):
    from milan_ray import cli

    monkeypatch.setenv("MILAN_LOG", "text")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.main(["report", "--storage", str(tmp_path), "--log", "json"]) == 1
    assert os.environ["MILAN_LOG"] == "text"
    monkeypatch.setenv("MILAN_LOG", "json")
    with Progress("views", 5, "images") as bar:
        bar.advance(5)
    error, line = map(json.loads, capsys.readouterr().err.splitlines())
    assert error["level"] == "error" and error["message"].startswith("error: ")
    assert line["stage"] == "views"
