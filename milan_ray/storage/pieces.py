"""Pieces of work: one object with several Arrow tables, of which one is read without the others.

The tables, an index and its length follow each other. A piece lies in the folder of the parts that it holds, so that a
listing tells them: every piece of a folder was made for the same parts, and its name is their hash.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from milan_ray.config import config_hash
from milan_ray.errors import DamagedTable
from milan_ray.storage.files import WORK
from milan_ray.storage.work import COMPRESSED, Work

PIECES = "pieces"
"""Folder of pieces in the work of a configuration."""

ENDING = ".parts"

AHEAD = 16
"""Parts of an object store that are read at once."""

_TAIL = struct.Struct("<II8s")
"""Last bytes of a piece: length and checksum of its index, and what kind of file it is."""

_KIND = b"MILANPT1"

_END = 2**15
"""Bytes at the end of a piece that are read first: the index, and most often the last part."""

Index = Mapping[str, tuple[int, int, int]]
"""Part → where it begins, its length and its checksum."""


class Pieces(Work):
    """Files with pieces of work among them."""

    def put_piece(self, config: str, shard: str, holds: Collection[str], parts: Iterable[tuple[str, pa.Table]]) -> None:
        """Writes a piece; readers see all of it or none.

        Args:
            config: Configuration hash of the work.
            shard: What the piece is made of.
            holds: The parts that it is made for; of a part that came out empty there may be no table.
            parts: (part, table), written one after the other. What is read most often comes last.
        """
        self.put(f"{WORK}/{config}/{piece_name(shard, holds)}{ENDING}", encode(holds, parts))

    def get_part(self, config: str, piece: str, part: str, known: dict[str, Index] | None = None) -> pa.Table:
        """Reads one part of a piece by its name, as :meth:`pieces_with` gives it.

        Args:
            config: Configuration hash of the work.
            piece: Name of the piece.
            part: The part.
            known: Indexes of pieces by path, to read them once only; the piece's is added.

        Raises:
            WorkRemovedError: The piece does not exist.
            KeyError: It was made for this part, which came out empty.
        """
        path = f"{WORK}/{config}/{piece}{ENDING}"
        try:
            # Another job may put its own piece there between two requests to an object store: they do not fit then.
            for _ in range(2):
                try:
                    return self._read_part(path, part, {} if known is None else known)
                except DamagedTable as error:
                    damage = error
                    if known is not None:
                        known.pop(path, None)
        except FileNotFoundError as error:
            raise self._gone(path) from error
        self.remove_file(path)
        raise self._was_damaged(path) from damage

    def get_parts(self, config: str, pieces: Sequence[str], part: str, ahead: int = AHEAD) -> Iterator[pa.Table]:
        """Yields one part of several pieces, in their order; arguments and errors as of :meth:`get_each`."""
        return self.get_each(config, [(piece, part) for piece in pieces], ahead)

    def get_each(
        self,
        config: str,
        parts: Sequence[tuple[str, str]],
        ahead: int = AHEAD,
        known: dict[str, Index] | None = None,
    ) -> Iterator[pa.Table]:
        """Yields parts of pieces, in their order; on an object store several are read at once.

        Args:
            config: Configuration hash of the work.
            parts: (piece, part) of each.
            ahead: Parts at most that are in memory.
            known: As of :meth:`get_part`.

        Raises:
            WorkRemovedError: One of the pieces does not exist.
        """
        if self.is_local:
            yield from (self.get_part(config, piece, part, known) for piece, part in parts)
            return
        waiting: deque[Future[pa.Table]] = deque()
        with ThreadPoolExecutor(ahead) as readers:
            try:
                for piece, part in parts:
                    waiting.append(readers.submit(self.get_part, config, piece, part, known))
                    if len(waiting) == ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                readers.shutdown(cancel_futures=True)

    def pieces_with(self, config: str, parts: Collection[str]) -> dict[str, str]:
        """The pieces that were made for some parts, and maybe for others: shard → name of its piece.

        This takes one listing, and reads the index of one piece of each folder that was made for other parts.
        """
        folders: dict[str, dict[str, str]] = defaultdict(dict)
        prefix = f"{WORK}/{config}/"
        for path in self.files(prefix + PIECES):
            if path.endswith(ENDING):
                piece = path[len(prefix) : -len(ENDING)]
                root, made_for, shard = piece.split("/", 2)
                folders[f"{root}/{made_for}"][shard] = piece
        found = folders.pop(_folder(parts), {})
        for _, pieces in sorted(folders.items()):
            if set(parts) <= self._holds(config, pieces):
                found = {**pieces, **found}
        return found

    def _holds(self, config: str, pieces: dict[str, str]) -> set[str]:
        """What the pieces of a folder were made for; nothing where none can be read."""
        for piece in pieces.values():
            path = f"{WORK}/{config}/{piece}{ENDING}"
            try:
                with self._explain_reading(path), self._fs.open_input_file(self._target(path)) as stream:
                    return set(read_index(stream)[0])
            except (FileNotFoundError, pa.ArrowInvalid):  # removed by another job, or damaged: then it is made anew
                continue
        return set()

    def _read_part(self, path: str, part: str, known: dict[str, Index]) -> pa.Table:
        """Reads a part.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedTable: Its content is damaged.
        """
        with self._explain_reading(path), self.intact(path), self._fs.open_input_file(self._target(path)) as stream:
            before, end = stream.size(), b""
            if path not in known:
                _, known[path], end = read_index(stream)
                before -= len(end)
            start, length, checksum = known[path][part]
            data = end[start - before :][:length] if start >= before else stream.read_at(length, start)
            if len(data) != length or zlib.crc32(data) != checksum:
                raise pa.ArrowInvalid(f"part {part!r} has another checksum")
            table = pa.ipc.open_stream(pa.BufferReader(data)).read_all()
            table.validate(full=True)
            return table


def piece_name(shard: str, holds: Collection[str]) -> str:
    """The name of a shard's piece that was made for some parts."""
    return f"{_folder(holds)}/{shard}"


def _folder(holds: Collection[str]) -> str:
    return f"{PIECES}/{config_hash({'parts': sorted(holds)})}"


def encode(holds: Collection[str], parts: Iterable[tuple[str, pa.Table]]) -> memoryview:
    """The bytes of a piece; arguments as of :meth:`Pieces.put_piece`."""
    sink = io.BytesIO()
    index: dict[str, tuple[int, int, int]] = {}
    for name, table in parts:
        start = sink.tell()
        with pa.ipc.new_stream(sink, table.schema, options=COMPRESSED) as writer:
            writer.write_table(table)
        with sink.getbuffer() as written:
            index[name] = (start, len(written) - start, zlib.crc32(written[start:]))
    text = json.dumps({"holds": sorted(holds), "parts": index}).encode()
    sink.write(text + _TAIL.pack(len(text), zlib.crc32(text), _KIND))
    return sink.getbuffer()


def read_index(stream: pa.NativeFile) -> tuple[list[str], Index, bytes]:
    """What a piece was made for, its index, and the last bytes of the file, the index among them.

    Raises:
        pa.ArrowInvalid: The file is damaged, or no piece.
    """
    size = stream.size()
    end = stream.read_at(min(_END, size), max(0, size - _END))
    if len(end) < _TAIL.size:
        raise pa.ArrowInvalid("it is too short")
    length, checksum, kind = _TAIL.unpack(end[-_TAIL.size :])
    whole = length + _TAIL.size
    if kind != _KIND or whole > size:
        raise pa.ArrowInvalid("it ends without an index")
    if whole > len(end):
        end = stream.read_at(whole, size - whole)
    text = end[-whole : -_TAIL.size]
    if zlib.crc32(text) != checksum:
        raise pa.ArrowInvalid("its index has another checksum")
    entries = json.loads(text)
    return entries["holds"], entries["parts"], end
