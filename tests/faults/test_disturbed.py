"""A job whose workers, nodes, driver or disk fail ends with the tables of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from gates import Gate, passes, wait_until
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/slow_models.py")
KILLS = int(os.environ.get("MILAN_SOAK", "4"))
"""Times that the driver is killed; `make soak` sets more."""

WRITES = 60
"""Writes of the job, roughly; a job is killed before one of them: an earlier one, as often as it was through before."""

linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")


SHARDS = 23
"""Shards of the job's probe; each is one pass."""

COST = (1, 2)
"""Passes more when one is cut off: its own, and perhaps that of the shard before, whose answer was still on its way."""

JOB_MEMORY = 3 * 2**30
"""Bytes: more than the processes of the job take together."""


def waiting(where: Path, passes: int, gate: Path | None = None, hunger: Path | None = None) -> dict[str, str]:
    """The environment of a job that stops in the middle of a pass, or takes memory there, after so many passes."""
    files = {"MILAN_TEST_WHERE": where, "MILAN_TEST_GATE": gate, "MILAN_TEST_HUNGER": hunger}
    return {"MILAN_TEST_PASSES": str(passes), **{name: str(file) for name, file in files.items() if file}}


@linux
@pytest.mark.slow
def test_worker_killed_in_the_middle_of_a_shard_costs_that_shard_alone(job, undisturbed, below, tmp_path):
    storage, where, gate = Storage(tmp_path / "run"), tmp_path / "where", tmp_path / "gate"
    job = replace(job, environment=waiting(where, 3, gate), verb="exemplars", actors=1)
    process = job.start(storage.root)
    wait_until(lambda: passes(where) > 3, "the fourth shard has begun", process)
    victims = [pid for pid, command in below(process.pid).items() if "ExemplarWorker" in command]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    gate.touch()
    said = process.communicate(timeout=600)[1]
    assert victims and process.returncode == 0, said
    job.assert_same(storage, undisturbed)
    assert passes(where) - SHARDS in COST


@linux
@pytest.mark.slow
@pytest.mark.alone
def test_worker_killed_for_the_memory_it_takes_costs_that_shard_alone(job, undisturbed, tmp_path):
    """By Ray's own memory monitor, whose limit is set a little above what this machine uses at the moment."""
    storage, where, hunger = Storage(tmp_path / "run"), tmp_path / "where", tmp_path / "hunger"
    total, used = get_system_memory(), get_used_memory()
    limit = used + JOB_MEMORY
    if total - limit < 2**31:
        pytest.skip("takes some GiB of memory")
    logs = Path(tempfile.mkdtemp(prefix="ray"))  # sockets' paths must be short
    monitor = {"RAY_memory_usage_threshold": str(limit / total), "RAY_memory_monitor_refresh_ms": "50"}
    told = {"RAY_TMPDIR": str(logs), "RAY_BACKEND_LOG_LEVEL": "info"}
    environment = {**waiting(where, 3, hunger=hunger), **monitor, **told}
    job = replace(job, environment=environment, verb="exemplars", actors=1)
    try:
        said = job.run(storage.root)
        raylet = "".join(file.read_text() for file in logs.rglob("raylet.out"))
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    assert hunger.exists(), said
    assert re.search("(above|exceeded) threshold", raylet)
    job.assert_same(storage, undisturbed)
    assert passes(where) - SHARDS in COST


def stands(gate: Gate, process: subprocess.Popen[str]) -> bool:
    """Whether a job waits at its gate, or has ended."""
    return bool(gate.reached()) or process.poll() is not None


@pytest.mark.slow
def test_driver_killed_before_any_of_its_writes_again_and_again(job, undisturbed, kill_all, tmp_path):
    """Each time it continues where it was killed, so that later writes come near; once it was through, it begins anew.

    Before whichever write: workers' own and the driver's, of work files, tables and records. Every third job has
    actors; the others go on, on threads, with what these had done, and these with what threads had.
    """
    rng, root = random.Random(KILLS), tmp_path / "run"
    storage, killed, rounds, most = Storage(root), 0, 0, WRITES
    while killed < KILLS:
        rounds += 1
        gate = Gate(tmp_path / f"gate-{rounds}", re.escape(str(root)), rng.randint(1, most))
        process = replace(job, environment=gate.environment, actors=int(rounds % 3 == 1)).start(storage.root)
        wait_until(partial(stands, gate, process), "gate or end")
        if not gate.reached():
            assert process.wait() == 0, process.communicate()[1]
            process.communicate()
            job.assert_same(storage, undisturbed)
            most = max(most // 2, 3)
            for folder in ("descriptions", "candidates", "encodings", "exemplars", "levels", "views")[
                : rng.randint(1, 6)
            ]:
                storage.remove(folder)
            continue
        kill_all(process)
        process.communicate()
        killed += 1
        assert not list(tmp_path.rglob("*.parquet.tmp"))
    job.run(storage.root)
    job.assert_same(storage, undisturbed)


@pytest.mark.slow
def test_file_of_any_kind_that_cannot_be_written_is_one_sentence_and_no_torso(job, undisturbed, tmp_path):
    log, result = tmp_path / "log", tmp_path / "result"
    here = str(ROOT / "tests/faults")
    arguments = [str(result), str(tmp_path / "run"), str(log), str(job.photos), PLUGIN, str(job.captioner)]
    done = subprocess.run(
        [sys.executable, f"{here}/full_disk.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said, kinds = json.loads(result.read_text()), {file.name: file.read_text() for file in log.iterdir()}
    assert len(kinds) >= 12 and kinds["_work pieces parts"] != kinds["manifest"], "no actor's write failed"
    for public in ("manifest", "skipped", "exemplars", "levels", "views", "encodings", "candidates", "descriptions"):
        assert public in kinds
    assert len(said) >= len(kinds) / 2  # the threads of two layers may fail in the same run
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for sentence in said:
        assert "cannot write" in sentence and "File too large" in sentence and "\n" not in sentence
    job.assert_same(Storage(tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_two_jobs_on_one_storage_end_with_the_tables_of_one(job, undisturbed, tmp_path):
    """The same job twice, side by side, and one of another network that shows some of the same images.

    None begins before all have come to their first write of work in progress.
    """
    root = tmp_path / "run"
    gates = [Gate(tmp_path / f"gate-{number}", rf"^{re.escape(str(root))}/_work/", 1) for number in range(3)]
    models = ("slow/cnn", "slow/cnn", "slow/other")
    jobs = [
        replace(job, environment=gate.environment).start(root, model=model)
        for gate, model in zip(gates, models, strict=True)
    ]
    for gate, process in zip(gates, jobs, strict=True):
        gate.wait(process)
    for gate in gates:
        gate.open()
    for process in jobs:
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said
    storage = Storage(root)
    found = job.tables(storage)
    for name, table in undisturbed.items():
        assert found[name].equals(table), name
    assert {name.replace("slow/other", "slow/cnn") for name in found} == undisturbed.keys()
    assert not storage.files("_work")
