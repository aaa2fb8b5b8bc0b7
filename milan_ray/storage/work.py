"""Work in progress: Arrow files below ``_work/<configuration hash>/``, removed once the result is public."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pyarrow as pa

from milan_ray.errors import DamagedTable, MilanError
from milan_ray.storage.atomic import remove_abandoned
from milan_ray.storage.files import WORK, Files

COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")
"""How work tables are written."""


class WorkRemovedError(MilanError):
    """Work in progress no longer exists: another job on the same storage has finished it."""


class Work(Files):
    """Files with work in progress among them."""

    def put_work(self, config: str, name: str, table: pa.Table) -> None:
        """Writes a work table under a name that depends on configuration and shard alone.

        Work is Arrow IPC, not Parquet: it is written and read once, and no glob for tables can meet it.
        """
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, table.schema, options=COMPRESSED) as writer:
            writer.write_table(table)
        self.put(f"{WORK}/{config}/{name}.arrow", buffer.getbuffer())

    def get_work(self, config: str, name: str) -> pa.Table:
        """Reads a work table.

        Raises:
            WorkRemovedError: It does not exist.
        """
        path = f"{WORK}/{config}/{name}.arrow"
        try:
            data = self.get(path)
        except FileNotFoundError as error:
            raise self._gone(path) from error
        try:
            with self.intact(path):
                table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
                table.validate(full=True)
                return table
        except DamagedTable as error:
            self.remove_file(path)
            raise self._was_damaged(path) from error

    def _gone(self, path: str) -> WorkRemovedError:
        return WorkRemovedError(f"{self.uri(path)} is gone; run the job again to go on from what is there.")

    def _was_damaged(self, path: str) -> WorkRemovedError:
        return WorkRemovedError(f"{self.uri(path)} was damaged and is gone; run the job again to make it anew.")

    def work_names(self, config: str, folder: str = "") -> list[str]:
        """The names of a configuration's finished work tables, below one of its folders."""
        prefix = f"{WORK}/{config}/"
        names = [path[len(prefix) :] for path in self.files(f"{prefix}{folder}".rstrip("/"))]
        return [name.removesuffix(".arrow") for name in names if name.endswith(".arrow")]

    def remove_work(self, config: str) -> None:
        """Removes a configuration's work, and the folder of all work when nothing else is in it."""
        self.remove(f"{WORK}/{config}")
        self._remove_empty_work()

    def check_writable(self) -> None:
        """Fails before any work is done where nothing could be written later.

        Raises:
            MilanError: The root cannot be written.
        """
        path = f"{WORK}/writable"
        self.put(path, b"")
        self.remove_file(path)
        self._remove_empty_work()

    def _remove_empty_work(self) -> None:
        """Removes the folder of work in progress, unless a job has work there; the next writer makes it again."""
        if self.is_local:
            remove_abandoned(Path(self._base, WORK))
            try:
                os.rmdir(f"{self._base}/{WORK}")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
