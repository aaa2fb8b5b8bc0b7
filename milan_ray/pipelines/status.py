"""What a storage holds: models × layers × stages, and work that is not finished.

Whether exemplars are those of today's weights and images only a dry run can tell: it needs both.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime

from milan_ray.config import Recipe
from milan_ray.schema import ANNOTATIONS, CANDIDATES, DESCRIPTIONS, DRAWINGS, ENCODINGS, EXEMPLARS, POOLED, Noun
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, PARTS_KEY, UNITS_KEY, WHOLE_KEY, WORK, Storage

STAGES = (EXEMPLARS, POOLED, ANNOTATIONS, ENCODINGS, CANDIDATES, DRAWINGS, DESCRIPTIONS)
"""The tables of layers; each is made from earlier ones."""


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
        state: Empty; or why it no longer belongs to what it was made from: stale or orphaned.
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
        partitions: Every partition of the tables of layers, in the order of the stages.
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
        models = {found.keys["model"] for found in self.partitions}
        layers = {(found.keys["model"], found.keys["layer"]) for found in self.partitions}
        amiss = sum(1 for found in self.partitions if found.state)
        lines.append(f"{len(layers)} layers of {len(models)} models; {amiss} tables stale or orphaned")
        for work in self.work:
            size = f"{work.bytes / 2**20:.1f} MiB"
            lines.append(f"unfinished   {WORK}/{work.config}: {work.files} files, {size}, the last {work.written}")
        return "\n".join(line.rstrip() for line in lines)


def status(storage: Storage) -> Status:
    """Looks at every file of a storage, at tables by their footers alone."""
    found: list[Partition] = []
    made: dict[tuple[str, str, str], dict[str, str]] = {}  # (table, model, layer) → digest of it as a part, its state
    exemplars: dict[tuple[str, str], dict[str, str]] = {}  # (model, layer) → what its exemplars are made of
    for noun in STAGES:
        stats = storage.stat(noun.name)
        for keys in storage.partitions(noun):
            meta = storage.metadata(noun, **keys) or {}
            state = _state(noun, keys, meta, made)
            if noun is EXEMPLARS:
                exemplars[keys["model"], keys["layer"]] = json.loads(meta.get(PARTS_KEY, "{}"))
            elif noun is POOLED:
                state = _beside(exemplars.get((keys["model"], keys["layer"]), {}), meta)
            config = meta.get(CONFIG_KEY, "")
            part = _digest(noun.name, meta.get(WHOLE_KEY, config))
            made.setdefault((noun.name, keys["model"], keys["layer"]), {})[part] = state
            written = _time(stats[storage.path(noun, **keys)].modified)
            rows = storage.count(noun, **keys)
            found.append(Partition(noun.name, keys, rows, meta.get(UNITS_KEY, ""), written, config, state))
    return Status(storage.root, _in_model_order(storage, found), _work(storage))


def _in_model_order(storage: Storage, found: list[Partition]) -> list[Partition]:
    """Partitions table by table, their layers as they follow one another in their model."""
    layers = {(part.keys["model"], part.keys["layer"]) for part in found}
    ordered = storage.in_model_order({"model": model, "layer": layer} for model, layer in layers)
    rank = {(keys["model"], keys["layer"]): number for number, keys in enumerate(ordered)}
    stage = {noun.name: number for number, noun in enumerate(STAGES)}

    def place(part: Partition) -> tuple[str | int, ...]:
        own = rank[part.keys["model"], part.keys["layer"]]
        return stage[part.table], *(own if key == "layer" else value for key, value in part.keys.items())

    return sorted(found, key=place)


def _digest(name: str, config: str) -> str:
    return Recipe.of({name: config}).parts[name]


def _state(
    noun: Noun, keys: dict[str, str], meta: dict[str, str], made: dict[tuple[str, str, str], dict[str, str]]
) -> str:
    """What became of that which a partition was made from."""
    parts: dict[str, str] = json.loads(meta.get(PARTS_KEY, "{}"))
    if EXEMPLARS_KEY in meta:
        parts["exemplars"] = _digest("exemplars", meta[EXEMPLARS_KEY])
    for above in STAGES[: STAGES.index(noun)]:
        if above.name in parts:
            there = made.get((above.name, keys["model"], keys["layer"]))
            if there is None:
                return f"orphaned: {above.name} are gone"
            if parts[above.name] not in there:
                return f"stale: {above.name} have changed"
            if there[parts[above.name]]:
                return f"stale: {above.name} are, too"
    return ""


def _beside(exemplars: dict[str, str], meta: dict[str, str]) -> str:
    """Whether pooled activations, made beside a layer's exemplars and not from them, are of something else."""
    parts: dict[str, str] = json.loads(meta.get(PARTS_KEY, "{}"))
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
