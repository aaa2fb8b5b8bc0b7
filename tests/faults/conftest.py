"""A small job of all stages, as a process of its own that can be disturbed, and its undisturbed result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from toys import toy_captioner

from milan_ray.captioner.checkpoints import to_bytes
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS, EXEMPLARS, LEVELS, SKIPPED, VIEWS
from milan_ray.storage import Storage
from tests.faults.every_stage import before_and_after, on_threads, stages  # noqa: F401  # fixtures

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/slow_models.py")
FIRST = (EXEMPLARS, LEVELS, SKIPPED, VIEWS)
TABLES = (*FIRST, ENCODINGS, CANDIDATES, DESCRIPTIONS)
"""What a job leaves behind; manifest and runs hold moments of reading and writing beside it."""


@dataclass(frozen=True)
class Job:
    """``jobs.describe`` on a slow network and 90 photographs, or its first half.

    Attributes:
        photos: The probe.
        captioner: Folder of a toy captioner.
        environment: Variables beside this process's own.
        verb: ``exemplars`` where the stages after these are not looked at.
        actors: Actors of each pool; 0 leaves it to the job, which is so small that it starts no Ray: threads of its own
            process do the same work, and write the same bytes (test_actors.py).
    """

    photos: Path
    captioner: Path
    environment: dict[str, str] = field(default_factory=dict)
    verb: str = "describe"
    actors: int = 0

    def command(self, storage: str | Path, *more: str, model: str = "slow/cnn") -> list[str]:
        options = {"--model": model, "--plugin": PLUGIN, "--probe": str(self.photos), "--storage": str(storage)}
        if self.verb == "describe":
            options |= {"--decoder": str(self.captioner), "--beam-size": "5", "--length": "5"}
        options |= {"--k": "4", "--batch-size": "16", "--shard-size": "4"}
        if self.actors:
            options["--actors"] = str(self.actors)
        arguments = [text for pair in options.items() for text in pair]
        return [sys.executable, "-m", f"jobs.{self.verb}", *arguments, "--no-report", *more]

    def start(self, storage: str | Path, *more: str, model: str = "slow/cnn") -> subprocess.Popen[str]:
        """Starts it in a process group of its own; what it says is to be read from ``stderr``."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            self.command(storage, *more, model=model),
            cwd=ROOT,
            env={**environment, **self.environment},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, storage: str | Path, *more: str, model: str = "slow/cnn") -> str:
        """Runs it to its end; returns what it said."""
        process = self.start(storage, *more, model=model)
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said
        return said

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> str:
        """Ends a job as a power cut would; returns what it had said."""
        early = process.poll()
        if early is None:
            os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        assert not early, said  # it failed by itself
        return said

    @staticmethod
    def tables(storage: Storage) -> dict[str, pa.Table]:
        """All tables of a storage, by table and partition."""
        return {
            f"{table.name} {keys}": storage.read(table, **keys)
            for table in TABLES
            for keys in storage.partitions(table)
        }

    def assert_same(self, found: Storage, expected: dict[str, pa.Table]) -> None:
        """Nothing twice, nothing missing, not a bit different; and nothing half done is left."""
        if self.verb == "exemplars":
            firsts = tuple(table.name for table in FIRST)
            expected = {name: table for name, table in expected.items() if name.split()[0] in firsts}
        there = self.tables(found)
        assert there.keys() == expected.keys()
        for name, table in expected.items():
            assert there[name].equals(table), name
        assert not found.files("_work")


@pytest.fixture(scope="session")
def job(photos, tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("captioner")
    for name, data in to_bytes(toy_captioner("slow")).items():
        (folder / name).write_bytes(data)
    return Job(photos, folder)


@pytest.fixture(scope="session")
def undisturbed(job, tmp_path_factory) -> dict[str, pa.Table]:
    """The tables of the job when nobody disturbs it."""
    path = tmp_path_factory.mktemp("undisturbed")
    job.run(path)
    found = job.tables(Storage(path))
    assert {name.split()[0] for name in found} == {table.name for table in TABLES}
    return found
