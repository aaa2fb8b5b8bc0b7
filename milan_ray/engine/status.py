"""Contents of a storage: models × layers × stages, and unfinished work.

Only a dry run can tell whether exemplars belong to the present weights and images, because it reads both.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime

from milan_ray.config import Fingerprint
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.schema import (
    ANNOTATIONS,
    CANDIDATES,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    EXEMPLARS,
    POOLED,
    TABLES,
    Table,
)
from milan_ray.storage import ALL_UNITS_KEY, CONFIG_KEY, EXEMPLARS_KEY, UNITS_KEY, WORK, FileStat, Storage, inputs_of

STAGES = (EXEMPLARS, POOLED, ANNOTATIONS, ENCODINGS, CANDIDATES, DRAWINGS, DESCRIPTIONS)
"""The tables of layers, each made from earlier ones."""

DAMAGED = "damaged"
"""First word of a damaged partition's state."""


@dataclass(frozen=True)
class Partition:
    """One partition of a table.

    Attributes:
        table: Name of the table.
        keys: Partition key → value.
        rows: Rows in it.
        units: The units it was made for, as ``1,5,7``; empty for all.
        written: Time of writing, UTC, ISO 8601; empty where the file system does not say.
        config: Configuration hash.
        state: Empty when it is current; else stale or orphaned, with the table that changed, or damaged.
    """

    table: str
    keys: dict[str, str]
    rows: int
    units: str
    written: str
    config: str
    state: str


@dataclass(frozen=True)
class Work:
    """Work in progress, or left by a killed job; the same job continues from it when started again.

    Attributes:
        config: Its configuration hash.
        files: Finished pieces.
        bytes: Their size.
        written: When the last was written, UTC, ISO 8601; empty where the file system does not say.
    """

    config: str
    files: int
    bytes: int
    written: str


@dataclass(frozen=True)
class Status:
    """Contents of a storage.

    Attributes:
        root: The storage.
        partitions: All partitions of the tables of layers, in the order of the stages, and the damaged partitions of
            other tables.
        work: Unfinished work.
    """

    root: str
    partitions: list[Partition]
    work: list[Work]

    def json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """A line for each partition and each piece of work."""
        lines = [f"{'table':12} {'partition':48} {'rows':>8}  {'written (UTC)':19}  configuration"]
        for part in self.partitions:
            units = f"units {part.units}" if part.units else ""
            notes = "; ".join(note for note in (units, part.state) if note)
            where = " ".join(part.keys.values())
            lines.append(f"{part.table:12} {where:48} {part.rows:8}  {part.written:19}  {part.config[:8]}  {notes}")
        layers = {(p.keys["model"], p.keys["layer"]) for p in self.partitions if {"model", "layer"} <= p.keys.keys()}
        models = {model for model, _ in layers}
        damaged = sum(part.state.startswith(DAMAGED) for part in self.partitions)
        stale = sum(bool(part.state) for part in self.partitions) - damaged
        also = f", {damaged} damaged" if damaged else ""
        lines.append(f"{len(layers)} layers of {len(models)} models; {stale} tables stale or orphaned{also}")
        for work in self.work:
            size = f"{work.bytes / 2**20:.1f} MiB"
            lines.append(f"unfinished   {WORK}/{work.config}: {work.files} files, {size}, the last {work.written}")
        return "\n".join(line.rstrip() for line in lines)


def status(storage: Storage, verify: bool = False) -> Status:
    """Lists the contents of a storage; tables are checked by their footers alone, unless ``verify`` is set.

    Args:
        storage: The run directory.
        verify: Read all rows of all tables, to find damage in them too.
    """
    partitions: list[Partition] = []
    made: dict[tuple[str, str, str], dict[str, str]] = {}  # (table, model, layer) → digest as an input → state
    exemplars: dict[tuple[str, str], dict[str, str]] = {}  # (model, layer) → inputs of its exemplars
    for table in STAGES:
        stats = storage.stat(table.name)
        for keys in storage.partitions(table):
            written = _written(stats, storage.path(table, **keys))
            try:
                meta, rows = _read(storage, table, keys, verify)
            except MilanError as error:
                digest, state = "", _damage(error)
                partitions.append(Partition(table.name, keys, 0, "", written, "", state))
                made.setdefault((table.name, keys["model"], keys["layer"]), {})[digest] = state
                continue
            state = _state(table, keys, meta, made)
            if table is EXEMPLARS:
                exemplars[keys["model"], keys["layer"]] = inputs_of(meta)
            elif table is POOLED:
                state = _pooled_state(exemplars.get((keys["model"], keys["layer"]), {}), meta)
            config = meta.get(CONFIG_KEY, "")
            digest = _digest(table.name, meta.get(ALL_UNITS_KEY, config))
            made.setdefault((table.name, keys["model"], keys["layer"]), {})[digest] = state
            partitions.append(Partition(table.name, keys, rows, meta.get(UNITS_KEY, ""), written, config, state))
    for table in TABLES:
        if table not in STAGES:
            partitions += _damaged(storage, table, verify)
    return Status(storage.root, _in_model_order(storage, partitions), _work(storage))


def _in_model_order(storage: Storage, partitions: list[Partition]) -> list[Partition]:
    """Sorts partitions by table, and layers by their order in the model."""
    layers = {(part.keys["model"], part.keys["layer"]) for part in partitions if "layer" in part.keys}
    ordered = storage.in_model_order({"model": model, "layer": layer} for model, layer in sorted(layers))
    rank = {(keys["model"], keys["layer"]): number for number, keys in enumerate(ordered)}
    stage = {table.name: number for number, table in enumerate((*STAGES, *TABLES))}

    def place(part: Partition) -> tuple[int, list[tuple[int, str]]]:
        own = rank.get((part.keys.get("model", ""), part.keys.get("layer", "")), 0)
        return stage[part.table], [(own, "") if key == "layer" else (0, value) for key, value in part.keys.items()]

    return sorted(partitions, key=place)


def _read(storage: Storage, table: Table, keys: dict[str, str], verify: bool) -> tuple[dict[str, str], int]:
    """A partition's metadata, and its number of rows.

    Raises:
        MilanError: The partition is damaged or cannot be read.
    """
    meta = storage.metadata(table, **keys) or {}
    if verify:
        for _ in storage.stream(table, **keys):
            pass
    return meta, storage.count(table, **keys)


def _damaged(storage: Storage, table: Table, verify: bool) -> list[Partition]:
    """The damaged partitions of a table that is not of layers."""
    stats = storage.stat(table.name)
    partitions = []
    for keys in storage.partitions(table):
        try:
            _read(storage, table, keys, verify)
        except MilanError as error:
            written = _written(stats, storage.path(table, **keys))
            partitions.append(Partition(table.name, keys, 0, "", written, "", _damage(error)))
    return partitions


def _damage(error: MilanError) -> str:
    return f"{DAMAGED if isinstance(error, DamagedTable) else 'unreadable'}: {error}"


def _written(stats: dict[str, FileStat], path: str) -> str:
    return _time(stats[path].modified) if path in stats else ""


def _digest(name: str, config: str) -> str:
    return Fingerprint.of({name: config}).inputs[name]


def _state(
    table: Table, keys: dict[str, str], meta: dict[str, str], made: dict[tuple[str, str, str], dict[str, str]]
) -> str:
    """State of a partition, by the tables that it was made from."""
    inputs = inputs_of(meta)
    if EXEMPLARS_KEY in meta:
        inputs["exemplars"] = _digest("exemplars", meta[EXEMPLARS_KEY])
    for above in STAGES[: STAGES.index(table)]:
        if above.name in inputs:
            states = made.get((above.name, keys["model"], keys["layer"]))
            if states is None:
                return f"orphaned: {above.name} are gone"
            if inputs[above.name] not in states:
                return f"stale: {above.name} are damaged" if "" in states else f"stale: {above.name} have changed"
            if states[inputs[above.name]]:
                return f"stale: {above.name} are, too"
    return ""


def _pooled_state(exemplars: dict[str, str], meta: dict[str, str]) -> str:
    """State of pooled activations, which share inputs with the layer's exemplars and are not made from them."""
    inputs = inputs_of(meta)
    other = [name for name in inputs if inputs[name] != exemplars.get(name, inputs[name])]
    return f"stale: exemplars have other {', '.join(other)}" if other else ""


def _work(storage: Storage) -> list[Work]:
    folders: dict[str, list[tuple[int, datetime | None]]] = {}
    for path, info in storage.stat(WORK).items():
        _, folder, *rest = path.split("/")
        if rest:
            folders.setdefault(folder, []).append((info.size, info.modified))
    return [
        Work(
            folder,
            len(files),
            sum(size for size, _ in files),
            max(_time(modified) for _, modified in files),
        )
        for folder, files in folders.items()
    ]


def _time(moment: datetime | None) -> str:
    return "" if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%S")
