"""Stages: each declares its outputs once, for runs and dry runs alike; the runner does everything else.

A :class:`Stage` makes the partitions of one table. ``outputs()`` lists them with their fingerprints. A
:class:`ShardedStage` also cuts the missing ones into shards, names the worker that runs a shard, and merges the pieces.
:func:`run_stage` finds the outputs that are due, runs the shards that are not stored yet on a pool of actors or
threads, merges, writes each table with its fingerprint and its row of the run log, retries when another job on the same
storage was faster, and removes the work in progress on success and on failure.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.references import check_units
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import retry_if_overtaken, run_parallel
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import Progress, say
from milan_ray.schema import CANDIDATES, CONTRAST_ENCODINGS, ENCODINGS, EXEMPLARS, LEVELS, Table
from milan_ray.storage import Storage
from milan_ray.storage.pieces import piece_name

_MADE_BY = {EXEMPLARS.name: "exemplars", CONTRAST_ENCODINGS.name: "describe --contrast MODEL"}
_MADE_BY |= {ENCODINGS.name: "describe", CANDIDATES.name: "describe"}
"""Table → the subcommand that makes it."""

Layers = Mapping[str, Sequence[str]]
"""Model → layers."""


def pairs(models: Layers) -> list[tuple[str, str]]:
    """All (model, layer) pairs."""
    return [(model, layer) for model, layers in models.items() for layer in layers]


@dataclass(frozen=True)
class Output:
    """One partition that a stage makes.

    Attributes:
        keys: The partition.
        fingerprint: Decides the partition's content.
        number: Index among the stage's outputs, set by the runner.
        table: Table of the partition where the stage makes several tables; None for the stage's own.
        about: Entry of the run log's model column, for a partition without a model.
        reason: Why it has to be made, where that is known without comparing fingerprints.
    """

    keys: Mapping[str, str]
    fingerprint: Fingerprint
    number: int = 0
    table: Table | None = None
    about: str = ""
    reason: str | None = None

    @property
    def model(self) -> str:
        """The model, or what the run log has in its place."""
        return self.keys.get("model", self.about)

    @property
    def layer(self) -> str:
        """The layer; empty for a partition without one."""
        return self.keys.get("layer", "")

    @property
    def of_layer(self) -> dict[str, str]:
        """The partition of its layer in tables of model and layer."""
        return {"model": self.model, "layer": self.layer}

    def columns(self, rows: pa.Table) -> dict[str, object]:
        """The columns of some rows, after the columns of the partition keys."""
        keys: dict[str, object] = {name: [value] * len(rows) for name, value in self.keys.items()}
        return keys | {name: rows[name] for name in rows.column_names}

    @property
    def part(self) -> str:
        """Name of its part of a shard's piece."""
        return str(self.number)


def piece_schema(table: Table, *without: str) -> pa.Schema:
    """Schema of a table's columns, without the partition keys and the given columns, for pieces of work."""
    return pa.schema([(c.name, c.type) for c in table.columns if c.name not in (*table.partition, *without)])


@dataclass(frozen=True)
class Stream:
    """An output that is too large for memory.

    Attributes:
        pieces: Its rows, in order.
        metadata: Metadata of its file.
    """

    pieces: Iterator[pa.Table]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """A piece of work: the unit of retry and of progress. Its composition never depends on the cluster.

    Attributes:
        name: Name of its piece.
        outputs: Numbers of the outputs that it has a part of.
        row: Further input of the worker, JSON-able.
        size: Its size, in the stage's unit of progress.
    """

    name: str
    outputs: tuple[int, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1


@dataclass(frozen=True)
class Shards:
    """The shards of a job, and which work is small enough for the driver, because workers take longer to start.

    Attributes:
        every: The shards; an output's pieces are merged in this order.
        merged_in_driver: Whether the driver merges the pieces.
        run_in_driver: Whether the driver runs the shards, whatever the resources are.
    """

    every: Sequence[Shard]
    merged_in_driver: bool
    run_in_driver: bool = False


class Known:
    """Fingerprints of the tables that a stage reads, as the storage holds them.

    A dry run also knows what earlier stages would have made (:mod:`milan_ray.engine.planner`).

    Args:
        storage: The run directory.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def config(self, table: Table, **keys: str) -> str:
        """Configuration hash of a partition.

        Raises:
            MilanError: The partition does not exist.
        """
        self._check_exists(table, keys)
        return self.storage.config_of(table, **keys)

    def all_units(self, table: Table, **keys: str) -> str:
        """Configuration hash that a partition has, or would have with all units of its layer.

        Raises:
            MilanError: The partition does not exist.
        """
        self._check_exists(table, keys)
        return self.storage.all_units_of(table, **keys)

    def _check_exists(self, table: Table, keys: Mapping[str, str]) -> None:
        verb = _MADE_BY.get(table.name)
        if verb is not None and self.storage.metadata(table, **keys) is None:
            partition = " ".join(keys.values())
            raise MilanError(f"no {table.name} of {partition} in {self.storage.root}; run jobs.{verb} first.")

    def pending(self, table: Table) -> bool:
        """Whether a stage before this one will make partitions of a table; never outside a dry run."""
        return False

    def check_units(self, units: tuple[int, ...], model: str, layer: str) -> None:
        """Refuses units that a layer does not have.

        Raises:
            MilanError: The layer lacks one of them.
        """
        check_units(units, self.storage.count(LEVELS, model=model, layer=layer), model, layer)


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    Attributes:
        storage: The run directory.
        work: Hash of its work in progress.
        every: All outputs.
        due: The outputs to make.
        resources: The part of the cluster to use.
    """

    storage: Storage
    work: str
    every: Sequence[Output]
    due: Sequence[Output]
    resources: Resources

    def store(self, shard: str, tables: Iterable[tuple[int, pa.Table]]) -> None:
        """Stores the piece of a shard that the driver has done: the number of each of its outputs, and its part."""
        _store(self.storage, self.work, self.due, shard, tables)


class Stage(ABC):
    """Makes the partitions of one table.

    Attributes:
        table: The table.
        name: Its name in the run log.
        title: Its name in messages.
        failed: Model → why it has no outputs; known once they are listed.
    """

    table: ClassVar[Table]
    name: str
    title: str
    failed: Mapping[str, str] = {}

    @abstractmethod
    def outputs(self, known: Known) -> Iterator[Output]:
        """Yields the partitions that the stage makes, with their fingerprints."""

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why an output has to be made; None when it is current."""
        return output.reason or storage.why(self.table, output.fingerprint, **output.keys)


class ShardWorker(ABC):
    """Runs shards of a :class:`ShardedStage` in one process, one after the other.

    Args:
        storage: The run directory.
        work: Hash of the stage's work in progress.
        outputs: Number → output, of those that are due.
        threads: Torch threads.
        device: Name of the device.
    """

    def __init__(self, storage: Storage, work: str, outputs: Mapping[int, Output], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._outputs = storage, work, outputs
        self._device = resolve_device(device)

    @abstractmethod
    def __call__(self, row: Row) -> Row:
        """Runs a shard: stores its piece, and may return the number of ``images`` it used.

        Args:
            row: The shard's row, and its ``name`` and ``outputs``.
        """

    def _store(self, row: Row, tables: Iterable[tuple[int, pa.Table]]) -> None:
        """Stores a shard's piece: the number of each of its outputs, and its part."""
        _store(self._storage, self._work, self._outputs.values(), row["name"], tables)


class ShardedStage(Stage):
    """A stage whose outputs are cut into shards.

    Attributes:
        worker: Class of the workers.
        label: Name of the stage in progress output.
        counted: Unit of progress.
        recorded: Whether the run log has a row for each output.
        uses_gpus: Whether the workers compute on GPUs where the cluster has some.
    """

    worker: ClassVar[type[ShardWorker]]
    label: str
    counted: ClassVar[str]
    recorded: ClassVar[bool] = True
    uses_gpus: ClassVar[bool] = True

    @abstractmethod
    def shards(self, job: Job) -> Shards:
        """Cuts the outputs that are due into shards."""

    @abstractmethod
    def arguments(self, job: Job) -> dict[str, Any]:
        """Constructor arguments of the workers, besides those of every :class:`ShardWorker`."""

    @abstractmethod
    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table | Stream:
        """Merges an output's pieces, which come in the order of the shards."""


class StepStage(Stage):
    """A stage that makes all outputs together, in several steps of its own."""

    @abstractmethod
    def run(self, job: Job) -> None:
        """Makes the outputs that are due, from what earlier runs left in the work."""

    def clean_up(self, storage: Storage) -> None:
        """Removes what a killed run left in other places than its own work; called where nothing is due."""
        return


class TaskStage(Stage):
    """A stage that makes each output by one task.

    Attributes:
        recorded: Whether the run log has a row for each output.
        remark: Message before the stage runs; empty for none.
    """

    recorded: ClassVar[bool] = False
    remark: str = ""

    @abstractmethod
    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Makes an output."""

    def runs_in_driver(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """Whether the driver makes these outputs itself, because workers would take longer to start."""
        return True


RunnableStage = ShardedStage | StepStage | TaskStage
"""A stage that :func:`run_stage` runs."""


@retry_if_overtaken
def run_stage(stage: RunnableStage, storage: Storage, resources: Resources) -> list[Output]:
    """Makes every output of a stage that is missing or stale.

    Args:
        stage: The stage.
        storage: The run directory.
        resources: The part of the cluster to use; Ray must be connected.

    Returns:
        All outputs of the stage.

    Raises:
        MilanError: A table that the stage reads is missing, or a worker failed.
    """
    every = numbered(stage, storage)
    due = [output for output in every if stage.why(storage, output)]
    if isinstance(stage, TaskStage):
        if stage.remark:
            say(stage.remark)
        list(run_parallel(partial(_make_output, stage, storage), due, in_driver=stage.runs_in_driver(storage, every)))
        return every
    work = _work(stage, every)
    if due:
        job = Job(storage, work, every, due, resources)
        try:
            if isinstance(stage, StepStage):
                stage.run(job)
            else:
                _make(stage, job)
        except DamagedTable:  # what it has done can no longer be finished
            storage.remove_work(work)
            raise
    else:
        if isinstance(stage, StepStage):
            stage.clean_up(storage)
        say(f"{stage.title}: all up to date")
    storage.remove_work(work)
    return every


def run_stages(stages: Iterable[RunnableStage], storage: Storage, resources: Resources) -> list[Output]:
    """Runs stages one after the other; returns the outputs of all. Arguments and errors as of :func:`run_stage`."""
    return [output for stage in stages for output in run_stage(stage, storage, resources)]


def numbered(stage: Stage, storage: Storage) -> list[Output]:
    """All outputs of a stage, numbered."""
    return [replace(output, number=number) for number, output in enumerate(stage.outputs(Known(storage)))]


def due(stage: Stage, storage: Storage) -> list[Output]:
    """The outputs of a stage that are missing or stale."""
    return [output for output in numbered(stage, storage) if stage.why(storage, output)]


def abandon(stage: Stage, storage: Storage) -> None:
    """Removes the work in progress of a stage whose outputs nobody needs any more."""
    storage.remove_work(_work(stage, stage.outputs(Known(storage))))


def _work(stage: Stage, outputs: Iterable[Output]) -> str:
    """Hash of a stage's work: over all outputs, so that a job killed while they become public finds its pieces."""
    return config_hash({stage.name: [output.fingerprint.hash for output in outputs]})


def _make(stage: ShardedStage, job: Job) -> None:
    """Runs the shards that are not stored yet, then merges the pieces of every output that is due."""
    shards = stage.shards(job)
    parts = [output.part for output in job.due]
    stored = job.storage.pieces_with(job.work, parts)
    costs = _run_shards(stage, job, shards, [shard for shard in shards.every if shard.name not in stored])
    names: dict[int, list[str]] = {output.number: [] for output in job.due}
    for shard in shards.every:
        for number in shard.outputs:
            # By name, not what is there now: another job may be removing the same work.
            names[number].append(stored.get(shard.name) or piece_name(shard.name, parts))
    merges = [(output, names[output.number], costs[output.number]) for output in job.due]
    list(run_parallel(partial(_merge, stage, job.storage, job.work), merges, in_driver=shards.merged_in_driver))


def _run_shards(stage: ShardedStage, job: Job, shards: Shards, fresh: Sequence[Shard]) -> dict[int, Cost]:
    """Runs the shards that are not stored yet; returns the cost of each output, by number."""
    output_of = {output.number: output for output in job.due}
    total = sum(shard.size for shard in fresh)
    say(f"{stage.title}: {len(job.due)} tables, {total} {stage.counted} to do")
    costs = {number: Cost() for number in output_of}
    rows: list[Row] = [{**shard.row, "name": shard.name, "outputs": shard.outputs} for shard in fresh]
    resources = job.resources if stage.uses_gpus else replace(job.resources, device="cpu", gpus_per_actor=None)
    arguments = {
        **stage.arguments(job),
        "storage": job.storage,
        "work": job.work,
        "outputs": output_of,
        "threads": resources.threads,
        "device": resources.device,
    }
    shard_of = {shard.name: shard for shard in fresh}
    layers = {number: (output.model, output.layer) for number, output in output_of.items()}
    pieces = (layers[number] for shard in fresh for number in shard.outputs)
    with Progress(stage.label, total, stage.counted, pieces) as progress:
        for answer in run_pool(stage.worker, arguments, rows, resources, shards.run_in_driver):
            shard = shard_of[answer["name"]]
            progress.advance(shard.size, (layers[number] for number in shard.outputs))
            for number in shard.outputs:
                costs[number].add(answer["seconds"], len(shard.outputs), answer.get("images", 0))
    return costs


def _merge(stage: ShardedStage, storage: Storage, work: str, item: tuple[Output, Sequence[str], Cost]) -> None:
    """Merges an output from its parts of the pieces of these names, and makes it public."""
    output, names, cost = item
    merged = stage.merge(storage, output, storage.get_parts(work, names, output.part))

    name = stage.name if stage.recorded else ""
    if not isinstance(merged, Stream):
        publish(storage, stage.table, output, merged, name, cost)
        return

    def recorded() -> Iterator[pa.Table]:  # the row of the run log is written before the file is complete
        rows = 0
        for piece in merged.pieces:
            rows += len(piece)
            yield piece
        if name:
            _record(storage, name, output, rows, cost)

    storage.write_stream(stage.table, recorded(), output.fingerprint, merged.metadata, **output.keys)


def _store(
    storage: Storage, work: str, due: Iterable[Output], shard: str, tables: Iterable[tuple[int, pa.Table]]
) -> None:
    """Stores a shard's piece: one object, whatever the number of outputs that it has a part of."""
    parts = ((str(number), table) for number, table in tables)
    storage.put_piece(work, shard, [output.part for output in due], parts)


def _make_output(stage: TaskStage, storage: Storage, output: Output) -> None:
    """Makes an output and its row of the run log, and makes it public."""
    started = time.monotonic()
    rows = stage.make(storage, output)
    seconds = time.monotonic() - started
    publish(storage, stage.table, output, rows, stage.name if stage.recorded else "", Cost(seconds, seconds))


def publish(storage: Storage, table: Table, output: Output, rows: pa.Table, stage: str, cost: Cost) -> None:
    """Writes an output's row of the run log, then its rows.

    Args:
        storage: The run directory.
        table: The output's table.
        output: The output.
        rows: Its rows.
        stage: Name in the run log; empty for no row.
        cost: What the output took.
    """
    if stage:
        _record(storage, stage, output, len(rows), cost)
    storage.write(table, rows, output.fingerprint, **output.keys)


def _record(storage: Storage, stage: str, output: Output, rows: int, cost: Cost) -> None:
    run = output.fingerprint.hash
    record_run(storage, stage, run, output.model, layer=output.layer, rows=rows, cost=cost)
