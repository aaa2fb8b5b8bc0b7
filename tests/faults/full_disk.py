"""Run by a test: a job on a storage where the first file of every kind cannot be written, run again after each.

``python full_disk.py RESULT STORAGE LOG PHOTOS PLUGIN CAPTIONER`` writes what the job said each time, as JSON, and for
every kind a file into the folder LOG, with the process whose write failed. This folder must be on ``PYTHONPATH``, so
that workers know the storage.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
from pathlib import Path

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage


def kind_of(path: str) -> str:
    """``_work/…/pieces/…/000003.parts`` is ``_work pieces parts``, ``exemplars/model=…`` is ``exemplars``."""
    parts = path.split("/")
    if parts[0] == "_work" and len(parts) > 2:
        return "_work " + re.sub(r"\d", "", parts[2]) + (" parts" if path.endswith(".parts") else "")
    return f"{parts[0]} wanted" if "wanted" in parts else parts[0]


LIMIT = threading.Lock()
"""Held by the thread whose write is to fail: the limit is the whole process's."""


class FullDisk(Storage):
    """The kernel refuses the first file of every kind half way, in whichever process it is written."""

    def __init__(self, root: str, log: str) -> None:
        super().__init__(root)
        self._log = log

    def __reduce__(self):
        return (FullDisk, (self.root, self._log))

    def put(self, path: str, data: bytes | memoryview) -> None:
        if not data or not self._first_of_its_kind(path):
            super().put(path, data)
            return
        with LIMIT:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, hard))
            try:
                super().put(path, data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def _first_of_its_kind(self, path: str) -> bool:
        """Whether nobody asked before, in any process."""
        try:
            with Path(self._log, kind_of(path)).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True


def read_parts(file: Path) -> None:
    """Reads every part of a piece."""
    import pyarrow as pa

    from milan_ray.storage.pieces import read_index

    folder, _, work, piece = (str(part) for part in re.split(r"/(_work)/([^/]+)/", str(file.with_suffix(""))))
    with pa.OSFile(str(file)) as stream:
        parts = read_index(stream)[1]
    for part in parts:
        Storage(folder).get_part(work, piece, part)


def torsos(root: Path) -> list[str]:
    """Files that are not whole, but for temporary ones of tasks that go on."""
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet as pq

    found = []
    for file in root.rglob("*"):
        try:
            if file.suffix == ".parquet":
                pq.read_table(file, partitioning=None)
            elif file.suffix == ".arrow":
                pa.ipc.open_file(file).read_all()
            elif file.suffix == ".parts":
                read_parts(file)
        except pa.ArrowException:
            found.append(str(file))
    return found


def main(result: str, root: str, log: str, photos: str, plugin: str, captioner: str) -> None:
    """Runs it until nothing fails any more: on an actor while that can fail, then on threads."""
    storage = FullDisk(root, log)
    Path(log).mkdir()
    request, probe = ModelRef("slow/cnn", plugins=(plugin,)), ProbeRef((photos,))
    encoder = EncoderRef("slow", plugins=(plugin,))
    config = ExemplarConfig(k=4, batch_size=16, shard_size=45)
    said: list[str] = []
    with connected(Resources()):
        while len(said) < 40:
            failed = {file.name for file in Path(log).iterdir()}
            resources = Resources(actors=None if "_work pieces parts" in failed else 1)
            try:
                done = Exemplars([request], probe, config).run(storage, resources)
                run_stage(Encodings(done.models, encoder), storage, resources)
                run_descriptions(storage, done.models, Search(captioner, 5, 5), resources)
                break
            except MilanError as error:
                said.append(str(error))
                assert torsos(Path(root)) == []
    Path(result).write_text(json.dumps(said))


if __name__ == "__main__":
    import full_disk  # by this name workers find the storage; what is of `__main__` would travel, and a lock cannot

    full_disk.main(*sys.argv[1:])
