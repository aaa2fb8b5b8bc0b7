"""Annotated units for training: features on disk, so that a training set may be larger than memory.

Every training worker reads the units of its share of every batch, by number, while the batch before is computed. A
Ray Data stream would deliver blocks in an order of its own, start anew (1.5 s) every epoch, and shuffle only within a
window; reading by number keeps the batches those of a set in memory, whatever the number of workers and after a resume.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.schema import ANNOTATIONS, ENCODINGS
from milan_ray.stages.encodings import unit_features
from milan_ray.storage import WORK, Storage, to_parquet

UNITS_PER_FILE = 256
READERS = 8
"""Files read at a time: an object store answers late, but many at once."""

TEXTS = "texts.parquet"
"""Work file with the annotations of every unit; written last, so where it is, all features are."""


def write_units(
    storage: Storage,
    work: str,
    source: str,
    encoder: str,
    layers: Sequence[tuple[str, str]],
    chosen: Sequence[Sequence[int]] = (),
) -> UnitFeatures:
    """Writes features and annotations of all annotated units, unless they are there; in memory is one layer at a time.

    A unit with fewer exemplars than the others of its layer is dead or broken and left out.

    Args:
        storage: The run directory, which holds encodings and annotations.
        work: Configuration hash of the training.
        source: Source of the annotations.
        encoder: Name of the encoder.
        layers: (model, layer) pairs.
        chosen: Of each layer, the units to take; empty for all that are annotated.

    Raises:
        MilanError: No unit is annotated, or units differ in number or size of their features.
    """
    if storage.exists(f"{_folder(work)}/{TEXTS}"):
        try:
            return UnitFeatures(storage, work, looked_through=True)
        except DamagedTable as error:
            say(f"{error} They are written anew.", level="warning")
    shapes: set[tuple[int, int]] = set()
    files: list[int] = []
    texts: list[list[str]] = []
    for place, (model, layer) in enumerate(layers):
        annotations = storage.read(ANNOTATIONS, source=source, model=model, layer=layer)
        said: dict[int, list[str]] = {}
        for row in annotations.sort_by([("unit", "ascending"), ("annotator", "ascending")]).to_pylist():
            said.setdefault(row["unit"], []).append(row["text"])
        features = unit_features(storage.read(ENCODINGS, encoder=encoder, model=model, layer=layer))
        most = max(map(len, features.values()), default=0)
        wanted = set(chosen[place]) if chosen else said.keys()
        units = [unit for unit in sorted(said) if len(features.get(unit, ())) == most > 0 and unit in wanted]
        for start in range(0, len(units), UNITS_PER_FILE):
            some = units[start : start + UNITS_PER_FILE]
            storage.put(_features(work, len(files)), _feature_file(np.stack([features[unit] for unit in some])))
            shapes.add(features[some[0]].shape)
            files.append(len(some))
        texts += [said[unit] for unit in units]
    if not shapes:
        raise MilanError(f"no annotated units among {len(layers)} layers in {storage.root}.")
    if len(shapes) > 1:
        raise MilanError(f"units have different numbers of exemplars or feature sizes: {sorted(shapes)}.")
    ((k, size),) = shapes
    table = pa.table({"texts": pa.array(texts, pa.list_(pa.string()))})
    metadata = {"k": str(k), "feature_size": str(size), "files": ",".join(map(str, files))}
    storage.put(f"{_folder(work)}/{TEXTS}", to_parquet(table, metadata))
    return UnitFeatures(storage, work)


def _folder(work: str) -> str:
    return f"{WORK}/{work}/units"


def _features(work: str, file: int) -> str:
    return f"{_folder(work)}/{file:06d}.parquet"


def _feature_file(features: np.ndarray) -> bytes:
    """Parquet of features (n, k, F), a row group per unit: what is read together is one unit's."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features[0].size)
    table = pa.table({"feature": column})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=1, compression="none", use_dictionary=False, write_page_checksum=True)
    return buffer.getvalue()


class UnitFeatures:
    """The annotated units of a training, in the order of its layers.

    Args:
        storage: The run directory.
        work: Configuration hash of the training, whose units :func:`write_units` wrote.

        looked_through: Look at all files first: what a killed job has left may be torn.

    Attributes:
        texts: The annotations of each unit.
        k: Exemplars of each.
        size: Size F of an exemplar's feature.

    Raises:
        DamagedTable: A file is.
    """

    def __init__(self, storage: Storage, work: str, looked_through: bool = False) -> None:
        self._storage, self._work = storage, work
        path = f"{_folder(work)}/{TEXTS}"
        with storage.intact(path):
            table = pq.read_table(pa.BufferReader(storage.get(path)), page_checksum_verification=True)
            metadata = table.schema.metadata or {}
            if missing := {b"k", b"feature_size", b"files"} - metadata.keys():
                raise pa.ArrowInvalid(f"its metadata lack {min(missing).decode()!r}")
            self.texts: list[list[str]] = table["texts"].to_pylist()
        self.k, self.size = int(metadata[b"k"]), int(metadata[b"feature_size"])
        files = [int(rows) for rows in metadata[b"files"].split(b",")]
        self._ends = np.cumsum(files)
        for file, rows in enumerate(files) if looked_through else ():
            with storage.intact(_features(work, file)), storage.open(_features(work, file)) as stream:
                if pq.ParquetFile(stream).metadata.num_rows != rows:
                    raise pa.ArrowInvalid(f"it has not the {rows} rows that it had")
        self._readers: dict[int, pq.ParquetFile] = {}
        self._resident: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return len(self) * self.k * self.size * 4

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS)

    def keep(self) -> None:
        """Reads all features into memory, for good."""
        self._resident = self.take(range(len(self)))

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """Features of some units by number, from memory or from disk: float32 (len(rows), k, F)."""
        if self._resident is not None:
            return self._resident[torch.as_tensor(rows)]
        found = np.empty((len(rows), self.k * self.size), np.float32)
        places: dict[int, list[int]] = {}
        for place, file in enumerate(np.searchsorted(self._ends, rows, side="right").tolist()):
            places.setdefault(file, []).append(place)

        def read(file: int) -> None:
            path = _features(self._work, file)
            with self._storage.intact(path):
                if file not in self._readers:
                    stream = self._storage.open(path)
                    self._readers[file] = pq.ParquetFile(stream, page_checksum_verification=True)
                first = int(self._ends[file - 1]) if file else 0
                for place in places[file]:
                    column = self._readers[file].read_row_group(rows[place] - first)["feature"]
                    found[place] = column.combine_chunks().flatten().to_numpy()

        for _ in self._pool.map(read, places):
            pass
        return torch.from_numpy(found).view(-1, self.k, self.size)
