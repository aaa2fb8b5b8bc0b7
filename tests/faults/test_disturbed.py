"""A job whose workers, nodes, driver or disk fail ends with the tables of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milan_ray.schema import EXEMPLARS, LEVELS, VIEWS
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/slow_models.py")
KILLS = int(os.environ.get("MILAN_SOAK", "6"))
"""Times that the driver is killed; `make soak` sets more."""

linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")


def shards_done(storage: Storage) -> int:
    return sum("/images/" in file for file in storage.files("_work"))


def workers_of(group: int, name: str) -> list[int]:
    """Processes of a process group, or started by it, whose title names a stage."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and name in (folder / "cmdline").read_text():
                ancestor = int(folder.name)
                while ancestor > 1 and ancestor != group:
                    ancestor = int((Path("/proc") / str(ancestor) / "stat").read_text().rpartition(")")[2].split()[1])
                if ancestor == group:
                    found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


@linux
@pytest.mark.slow
def test_worker_killed_in_the_middle_of_a_shard_costs_that_shard_alone(job, undisturbed, tmp_path):
    storage = Storage(tmp_path)
    process = job.start(tmp_path)
    while process.poll() is None and shards_done(storage) < 3:
        time.sleep(0.02)
    victims = workers_of(process.pid, "ExemplarWorker")
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=600)[1]
    assert victims and process.returncode == 0, said
    job.assert_same(storage, undisturbed)


@pytest.mark.slow
def test_node_lost_and_node_joined_in_the_middle(job, undisturbed, tmp_path):
    where = tmp_path / "where"
    alien = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE")
    environment = {name: value for name, value in os.environ.items() if name not in alien}
    environment |= {"MILAN_TEST_WHERE": str(where), "MILAN_TEST_SECONDS": "0.4"}
    command = [sys.executable, str(ROOT / "tests/faults/nodes.py"), str(tmp_path / "run"), str(job.photos), PLUGIN]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    head, lost, joined = json.loads(done.stdout.splitlines()[-1])
    ran = where.read_text().split()
    assert {head, lost, joined} == set(ran)
    assert ran.index(joined) > len(ran) - 1 - ran[::-1].index(lost)  # one was gone before the other came
    found = job.tables(Storage(tmp_path / "run"))
    for name, table in undisturbed.items():
        if name.split()[0] in (EXEMPLARS.name, LEVELS.name, VIEWS.name):
            assert found[name].equals(table), name


@pytest.mark.slow
def test_driver_killed_at_any_moment_again_and_again(job, undisturbed, tmp_path):
    rng = random.Random(KILLS)
    storage = Storage(tmp_path)
    killed = 0
    while killed < KILLS:
        process = job.start(tmp_path)
        # Starting Python and Ray takes a few seconds, in which nothing happens that a kill could harm.
        time.sleep(rng.uniform(4, 16))
        if process.poll() is not None:  # through before the kill: begin anew
            assert process.returncode == 0, process.communicate()[1]
            process.communicate()
            job.assert_same(storage, undisturbed)
            for folder in ("descriptions", "candidates", "encodings", "exemplars", "levels", "views")[
                : rng.randint(1, 6)
            ]:
                storage.remove(folder)
            continue
        job.kill(process)
        killed += 1
        assert not list(tmp_path.rglob("*.parquet.tmp"))
    job.run(tmp_path)
    job.assert_same(storage, undisturbed)


@pytest.mark.slow
def test_file_of_any_kind_that_cannot_be_written_is_one_sentence_and_no_torso(job, undisturbed, tmp_path):
    log = tmp_path / "log"
    here = str(ROOT / "tests/faults")
    command = [sys.executable, f"{here}/full_disk.py", str(tmp_path / "run"), str(log), str(job.photos), PLUGIN]
    done = subprocess.run(
        [*command, str(job.captioner)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said, kinds = json.loads(done.stdout.splitlines()[-1]), log.read_text().split("\n")[:-1]
    assert len(kinds) >= 12 and len(set(kinds)) == len(kinds)
    for public in ("manifest", "skipped", "exemplars", "levels", "views", "encodings", "candidates", "descriptions"):
        assert public in kinds
    assert len(said) >= len(kinds) - 2  # two threads may fail in the same run
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for sentence in said:
        assert "cannot write" in sentence and "File too large" in sentence and "\n" not in sentence
    job.assert_same(Storage(tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_two_jobs_on_one_storage_end_with_the_tables_of_one(job, undisturbed, tmp_path):
    """The same job twice, side by side, and one of another network that shows some of the same images."""
    twins = [job.start(tmp_path), job.start(tmp_path)]
    other = job.start(tmp_path, model="slow/other")
    for process in (*twins, other):
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said
    storage = Storage(tmp_path)
    found = job.tables(storage)
    for name, table in undisturbed.items():
        assert found[name].equals(table), name
    assert {name.replace("slow/other", "slow/cnn") for name in found} == undisturbed.keys()
    assert not [file for file in storage.files("_work") if file.endswith(".arrow")]
