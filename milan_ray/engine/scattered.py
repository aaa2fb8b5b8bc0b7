"""Rows of outputs sorted into shards: one object per output, of which a worker reads its shard's part alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from milan_ray.storage import Storage
from milan_ray.storage.pieces import Index, piece_name

_BY_SHARD = ("rows by shard",)
"""What these objects are made for; their parts are named by shards."""


class Scattered:
    """What a stage's shards take of its outputs.

    An object per output and shard would be as many as both multiplied, of a few rows each. Here a layer is written
    once, in the order of its shards, and a worker asks for its shard's part of each. It keeps the indexes, so that this
    is one request each.

    Args:
        storage: The run directory.
        work: Hash of the stage's work in progress.
    """

    def __init__(self, storage: Storage, work: str) -> None:
        self._storage, self._work = storage, f"{work}/scattered"
        self._known: dict[str, Index] = {}

    def put(self, number: int, parts: Iterable[tuple[str, pa.Table]]) -> None:
        """Writes what shards take of an output.

        Args:
            number: The output's number.
            parts: (name of the shard, or of what several shards need; rows).
        """
        self._storage.put_piece(self._work, str(number), _BY_SHARD, parts)

    def get(self, numbers: Sequence[int], part: str) -> Iterator[tuple[int, pa.Table]]:
        """Yields some outputs' numbers with the rows of a part; on an object store several are read at once.

        Args:
            numbers: Numbers of outputs that have this part.
            part: The part.

        Raises:
            WorkRemovedError: Another job has made the same tables meanwhile.
        """
        parts = [(piece_name(str(number), _BY_SHARD), part) for number in numbers]
        yield from zip(numbers, self._storage.get_each(self._work, parts, known=self._known), strict=True)
