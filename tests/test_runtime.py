"""Which cluster is joined, and what is settled before torch and Ray read it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

from milan_ray import runtime

LOCAL = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL")


@pytest.fixture
def environment(monkeypatch):
    """An environment without anything of Ray or OpenMP, put back afterwards."""
    for name in (*LOCAL, "RAY_ADDRESS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, None),
        ("local", None, None),
        (None, "local", None),
        ("auto", None, "auto"),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", "10.0.0.1:6379", "ray://head:10001"),
        ("local", "10.0.0.1:6379", None),
        ("10.0.0.2:6379", "local", "10.0.0.2:6379"),
    ],
)
def test_prepare_takes_the_given_address_else_the_variable(environment, given, variable, expected):
    if variable is not None:
        environment.setenv("RAY_ADDRESS", variable)
    assert runtime.prepare(given) == expected


def test_prepare_takes_an_empty_variable_for_none(environment):
    environment.setenv("RAY_ADDRESS", "")
    assert runtime.prepare(None) is None


def test_prepare_binds_only_a_local_ray_to_loopback(environment):
    runtime.prepare("10.0.0.1:6379")
    assert not [name for name in LOCAL if name in os.environ]
    runtime.prepare(None)
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_prepare_leaves_what_the_user_has_settled(environment):
    environment.setenv("OMP_WAIT_POLICY", "active")
    environment.setenv("RAY_BACKEND_LOG_LEVEL", "debug")
    runtime.prepare(None)
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["RAY_BACKEND_LOG_LEVEL"] == "debug"


def test_prepare_is_possible_before_torch_and_ray_are_imported():
    script = "import sys, milan_ray.cli; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_in_submitted_job_is_told_by_the_variable_that_ray_sets(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not runtime.in_submitted_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime.in_submitted_job()


FAULTS = """
import resource
from milan_ray.runtime import freed_memory_kept, keep_freed_memory

size = 2**26

def faults():  # pages that the system clears when 64 MB are used again
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b'x' * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    print(faults())
print(faults())
print(keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
@pytest.mark.parametrize(("variable", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_memory_is_kept_for_a_while_unless_the_user_has_set_the_allocator(variable, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**plain, **variable}, capture_output=True, text=True, check=True
    )
    during, afterwards, said, again = run.stdout.split()
    few, pages = 100, 2**26 // resource.getpagesize()
    assert (int(during) < few) == (int(again) < few) == kept and said == str(kept)
    assert few < int(afterwards) <= 2 * pages
