"""Annotated units for training, with features on disk, because a training set may be larger than memory.

Every training worker reads the units of its part of a batch by index, while the batch before is computed. Batches are
therefore the same as for a training set in memory, for any number of workers and after a resume. A Ray Data stream
would deliver blocks in arbitrary order, take 1.5 s to restart every epoch, and shuffle only within a window.
"""

from __future__ import annotations

import io
from collections import defaultdict
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
"""Files read at a time: an object store has a high latency, but serves many requests in parallel."""

TEXTS = "texts.parquet"
"""Work file with the annotations of every unit; written after all features, so it marks them complete."""


def annotated_texts(storage: Storage, source: str, model: str, layer: str) -> dict[int, list[str]]:
    """Unit → its annotations, by annotator."""
    annotations = storage.read(ANNOTATIONS, ["unit", "annotator", "text"], source=source, model=model, layer=layer)
    texts: dict[int, list[str]] = defaultdict(list)
    for row in annotations.sort_by([("unit", "ascending"), ("annotator", "ascending")]).to_pylist():
        texts[row["unit"]].append(row["text"])
    return texts


def annotations_config(
    storage: Storage, source: str, model: str, layer: str, exemplars: str | None, others: str = "those now"
) -> str:
    """Configuration hash of a layer's annotations.

    Args:
        storage: The run directory.
        source: Source of the annotations.
        model: Name of the model.
        layer: Module path.
        exemplars: Configuration hash of the exemplars that they must describe.
        others: What these exemplars are of, for the error.

    Raises:
        MilanError: Annotations are missing, or describe other exemplars.
    """
    keys = {"source": source, "model": model, "layer": layer}
    if storage.exemplars_of(ANNOTATIONS, **keys) not in (None, exemplars):
        raise MilanError(
            f"the annotations {source!r} of {model} {layer} speak of other exemplars than {others} in {storage.root}; "
            "annotate again, or restore the exemplars."
        )
    return storage.config_of(ANNOTATIONS, **keys)


def write_units(
    storage: Storage,
    work: str,
    source: str,
    encoder: str,
    layers: Sequence[tuple[str, str]],
    chosen: Sequence[Sequence[int]] = (),
) -> UnitFeatures:
    """Writes features and annotations of all annotated units unless they exist; holds one layer at a time in memory.

    Units with fewer exemplars than others of their layer are dead or broken and left out.

    Args:
        storage: The run directory, which holds encodings and annotations.
        work: Configuration hash of the training.
        source: Source of the annotations.
        encoder: Name of the encoder.
        layers: (model, layer) pairs.
        chosen: The units to take, for each layer; empty for all annotated ones.

    Raises:
        MilanError: No unit is annotated, or units differ in the number or size of their features.
    """
    if storage.exists(f"{_folder(work)}/{TEXTS}"):
        try:
            return UnitFeatures(storage, work, check=True)
        except DamagedTable as error:
            say(f"{error} They are written again.", level="warning")
    shapes: set[tuple[int, int]] = set()
    files: list[int] = []
    texts: list[list[str]] = []
    for index, (model, layer) in enumerate(layers):
        by_unit = annotated_texts(storage, source, model, layer)
        features = unit_features(storage.read(ENCODINGS, encoder=encoder, model=model, layer=layer))
        exemplars = max(map(len, features.values()), default=0)
        wanted = set(chosen[index]) if chosen else by_unit.keys()
        units = [unit for unit in sorted(by_unit) if len(features.get(unit, ())) == exemplars > 0 and unit in wanted]
        for start in range(0, len(units), UNITS_PER_FILE):
            of_file = units[start : start + UNITS_PER_FILE]
            storage.put(_features(work, len(files)), _feature_file(np.stack([features[unit] for unit in of_file])))
            shapes.add(features[of_file[0]].shape)
            files.append(len(of_file))
        texts += [by_unit[unit] for unit in units]
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
    """Features (n, k, F) as Parquet with one row group per unit, because units are read one by one."""
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
        check: Check the number of rows of all files, because a killed job may have left damaged ones.

    Attributes:
        texts: The annotations of each unit.
        k: Exemplars of each unit.
        size: Size F of an exemplar's feature.

    Raises:
        DamagedTable: A file is damaged.
    """

    def __init__(self, storage: Storage, work: str, check: bool = False) -> None:
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
        for file, rows in enumerate(files) if check else ():
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

    def keep(self, limit: float = float("inf")) -> None:
        """Reads all features into memory and keeps them, if they have at most ``limit`` bytes."""
        if self.nbytes <= limit:
            self._resident = self.take(range(len(self)))

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """Features of the units at these indices, from memory or from disk: float32 (len(rows), k, F)."""
        if self._resident is not None:
            return self._resident[torch.as_tensor(rows)]
        features = np.empty((len(rows), self.k * self.size), np.float32)
        by_file: dict[int, list[int]] = {}
        for index, file in enumerate(np.searchsorted(self._ends, rows, side="right").tolist()):
            by_file.setdefault(file, []).append(index)

        def read(file: int) -> None:
            path = _features(self._work, file)
            with self._storage.intact(path):
                if file not in self._readers:
                    stream = self._storage.open(path)
                    self._readers[file] = pq.ParquetFile(stream, page_checksum_verification=True)
                first = int(self._ends[file - 1]) if file else 0
                for index in by_file[file]:
                    column = self._readers[file].read_row_group(rows[index] - first)["feature"]
                    features[index] = column.combine_chunks().flatten().to_numpy()

        for _ in self._pool.map(read, by_file):
            pass
        return torch.from_numpy(features).view(-1, self.k, self.size)
