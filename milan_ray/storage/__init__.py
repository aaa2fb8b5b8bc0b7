"""The run directory: the tables on disk *are* the state.

Public tables are hive-partitioned, one file of a fixed name per partition, replaced whole (:mod:`.tables`). Work in
progress lies under ``_work/<configuration hash>/`` (:mod:`.work`, :mod:`.pieces`). Both are written by
:meth:`Storage.put`, so that a reader sees the old file or the new one and never a part of one (:mod:`.files`). Every
file carries the hash of the configuration that made it, and :meth:`Storage.is_current` is the one answer to "is this
done?".
"""

from __future__ import annotations

from milan_ray.storage.files import WORK, FileStat
from milan_ray.storage.parquet import (
    ALL_UNITS_KEY,
    CONFIG_KEY,
    CONTRASTS_KEY,
    EXEMPLARS_KEY,
    INPUTS_KEY,
    ORDER_KEY,
    UNITS_KEY,
    inputs_of,
    to_parquet,
)
from milan_ray.storage.pieces import Pieces
from milan_ray.storage.tables import FILE_NAME, Tables, natural
from milan_ray.storage.work import WorkRemovedError

__all__ = [
    "ALL_UNITS_KEY",
    "CONFIG_KEY",
    "CONTRASTS_KEY",
    "EXEMPLARS_KEY",
    "FILE_NAME",
    "INPUTS_KEY",
    "ORDER_KEY",
    "UNITS_KEY",
    "WORK",
    "FileStat",
    "Storage",
    "WorkRemovedError",
    "inputs_of",
    "natural",
    "to_parquet",
]


class Storage(Tables, Pieces):
    """Tables, work in progress and other files of one run directory, local or on an object store.

    Picklable: what travels is the root.

    Args:
        root: A local path (made absolute) or a URI that pyarrow knows (``s3://…``, ``gs://…``).

    Raises:
        MilanError: The URI names no file system that pyarrow knows.
    """

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return (Storage, (self.root,))

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"
