"""What a storage holds: models × layers × stages, and work that is not finished.

Whether exemplars are those of today's weights and images only a dry run can tell: it needs both.
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
from milan_ray.storage import ALL_UNITS_KEY, CONFIG_KEY, EXEMPLARS_KEY, UNITS_KEY, WORK, FileStat, Storage, parts_of

STAGES = (EXEMPLARS, POOLED, ANNOTATIONS, ENCODINGS, CANDIDATES, DRAWINGS, DESCRIPTIONS)
"""The tables of layers; each is made from earlier ones."""

DAMAGED = "damaged"
"""How the state of a damaged partition begins."""


@dataclass(frozen=True)
class Partition:
    """One partition of a table.

    Attributes:
        table: Name of the table.
        keys: Partition key → value.
        rows: Rows in it.
        units: The units it was made for, as ``1,5,7``; empty for all.
        written: When, UTC, ISO 8601; empty where the file system does not say.
        config: Configuration hash.
        state: Empty; or why it no longer belongs to what it was made from: stale or orphaned; or that it is damaged.
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
    """Work in progress, or left by a job that was killed: the same job, started again, goes on from there.

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
    """What a storage holds.

    Attributes:
        root: The storage.
        partitions: Every partition of the tables of layers, in the order of the stages; of other tables those that are
            damaged.
        work: Unfinished work.
    """

    root: str
    partitions: list[Partition]
    work: list[Work]

    def json(self) -> str:
        """All of it, for programs."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """A line for each partition and each piece of work."""
        lines = [f"{'table':12} {'partition':48} {'rows':>8}  {'written (UTC)':19}  configuration"]
        for found in self.partitions:
            units = f"units {found.units}" if found.units else ""
            notes = "; ".join(note for note in (units, found.state) if note)
            where = " ".join(found.keys.values())
            lines.append(f"{found.table:12} {where:48} {found.rows:8}  {found.written:19}  {found.config[:8]}  {notes}")
        of_layers = [found for found in self.partitions if {"model", "layer"} <= found.keys.keys()]
        models = {found.keys["model"] for found in of_layers}
        layers = {(found.keys["model"], found.keys["layer"]) for found in of_layers}
        damaged = sum(1 for found in self.partitions if found.state.startswith(DAMAGED))
        amiss = sum(1 for found in self.partitions if found.state) - damaged
        also = f", {damaged} damaged" if damaged else ""
        lines.append(f"{len(layers)} layers of {len(models)} models; {amiss} tables stale or orphaned{also}")
        for work in self.work:
            size = f"{work.bytes / 2**20:.1f} MiB"
            lines.append(f"unfinished   {WORK}/{work.config}: {work.files} files, {size}, the last {work.written}")
        return "\n".join(line.rstrip() for line in lines)


def status(storage: Storage, verify: bool = False) -> Status:
    """Looks at every file of a storage, at tables by their footers alone, unless they are to be verified.

    Args:
        storage: The run directory.
        verify: Read all tables, so that damage inside them is found, too.
    """
    found: list[Partition] = []
    made: dict[tuple[str, str, str], dict[str, str]] = {}  # (table, model, layer) → digest of it as a part, its state
    exemplars: dict[tuple[str, str], dict[str, str]] = {}  # (model, layer) → what its exemplars are made of
    for table in STAGES:
        stats = storage.stat(table.name)
        for keys in storage.partitions(table):
            written = _written(stats, storage.path(table, **keys))
            try:
                meta, rows = _look(storage, table, keys, verify)
            except MilanError as error:
                part, state = "", _damage(error)
                found.append(Partition(table.name, keys, 0, "", written, "", state))
                made.setdefault((table.name, keys["model"], keys["layer"]), {})[part] = state
                continue
            state = _state(table, keys, meta, made)
            if table is EXEMPLARS:
                exemplars[keys["model"], keys["layer"]] = parts_of(meta)
            elif table is POOLED:
                state = _beside(exemplars.get((keys["model"], keys["layer"]), {}), meta)
            config = meta.get(CONFIG_KEY, "")
            part = _digest(table.name, meta.get(ALL_UNITS_KEY, config))
            made.setdefault((table.name, keys["model"], keys["layer"]), {})[part] = state
            found.append(Partition(table.name, keys, rows, meta.get(UNITS_KEY, ""), written, config, state))
    for table in TABLES:
        if table not in STAGES:
            found += _damaged(storage, table, verify)
    return Status(storage.root, _in_model_order(storage, found), _work(storage))


def _in_model_order(storage: Storage, found: list[Partition]) -> list[Partition]:
    """Partitions table by table, their layers as they follow one another in their model."""
    layers = {(part.keys["model"], part.keys["layer"]) for part in found if "layer" in part.keys}
    ordered = storage.in_model_order({"model": model, "layer": layer} for model, layer in sorted(layers))
    rank = {(keys["model"], keys["layer"]): number for number, keys in enumerate(ordered)}
    stage = {table.name: number for number, table in enumerate((*STAGES, *TABLES))}

    def place(part: Partition) -> tuple[int, list[tuple[int, str]]]:
        own = rank.get((part.keys.get("model", ""), part.keys.get("layer", "")), 0)
        return stage[part.table], [(own, "") if key == "layer" else (0, value) for key, value in part.keys.items()]

    return sorted(found, key=place)


def _look(storage: Storage, table: Table, keys: dict[str, str], verify: bool) -> tuple[dict[str, str], int]:
    """A partition's metadata and rows.

    Raises:
        MilanError: It is damaged, or cannot be read.
    """
    meta = storage.metadata(table, **keys) or {}
    if verify:
        for _ in storage.stream(table, **keys):
            pass
    return meta, storage.count(table, **keys)


def _damaged(storage: Storage, table: Table, verify: bool) -> list[Partition]:
    """The damaged partitions of a table that is not of layers."""
    stats = storage.stat(table.name)
    found = []
    for keys in storage.partitions(table):
        try:
            _look(storage, table, keys, verify)
        except MilanError as error:
            written = _written(stats, storage.path(table, **keys))
            found.append(Partition(table.name, keys, 0, "", written, "", _damage(error)))
    return found


def _damage(error: MilanError) -> str:
    return f"{DAMAGED if isinstance(error, DamagedTable) else 'unreadable'}: {error}"


def _written(stats: dict[str, FileStat], path: str) -> str:
    return _time(stats[path].modified) if path in stats else ""


def _digest(name: str, config: str) -> str:
    return Fingerprint.of({name: config}).inputs[name]


def _state(
    table: Table, keys: dict[str, str], meta: dict[str, str], made: dict[tuple[str, str, str], dict[str, str]]
) -> str:
    """What became of that which a partition was made from."""
    parts = parts_of(meta)
    if EXEMPLARS_KEY in meta:
        parts["exemplars"] = _digest("exemplars", meta[EXEMPLARS_KEY])
    for above in STAGES[: STAGES.index(table)]:
        if above.name in parts:
            there = made.get((above.name, keys["model"], keys["layer"]))
            if there is None:
                return f"orphaned: {above.name} are gone"
            if parts[above.name] not in there:
                damaged = "" in there
                return f"stale: {above.name} are damaged" if damaged else f"stale: {above.name} have changed"
            if there[parts[above.name]]:
                return f"stale: {above.name} are, too"
    return ""


def _beside(exemplars: dict[str, str], meta: dict[str, str]) -> str:
    """Whether pooled activations, made beside a layer's exemplars and not from them, are of something else."""
    parts = parts_of(meta)
    other = [name for name in parts if parts[name] != exemplars.get(name, parts[name])]
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
