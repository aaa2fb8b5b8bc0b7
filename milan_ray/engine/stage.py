"""Stages: each declares its outputs once, for runs and dry runs alike; the runner does everything else.

A :class:`Stage` makes the partitions of one table. ``outputs()`` says which there will be and what decides each. A
:class:`ShardedStage` also cuts the missing ones into shards, has a worker that does a shard, and merges the pieces.
:func:`run_stage` asks which outputs are due and why, runs the shards that are not stored yet on a pool of actors or
threads, merges, writes each table with its fingerprint and its row of the run log, retries when another job on the same
storage was faster, and removes the work in progress on every way out.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyarrow as pa

from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.references import check_units
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import removed_if_damaged, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError
from milan_ray.progress import Progress, say
from milan_ray.schema import CANDIDATES, ENCODINGS, EXEMPLARS, LEVELS, Table
from milan_ray.storage import Storage

_MADE_BY = {EXEMPLARS.name: "exemplars", ENCODINGS.name: "describe", CANDIDATES.name: "describe"}
"""Table → the verb that makes it."""

PIECES = "pieces"
"""Folder of finished pieces in the work of a stage: one folder per output, one file per shard."""


Layers = Mapping[str, Sequence[str]]
"""Model → layers."""


def pairs(models: Layers) -> list[tuple[str, str]]:
    """(model, layer) of all layers."""
    return [(model, layer) for model, layers in models.items() for layer in layers]


@dataclass(frozen=True)
class Output:
    """One partition that a stage makes.

    Attributes:
        keys: Its partition.
        fingerprint: What decides its content.
        number: Its place among the stage's outputs, which the runner tells it.
        about: What the run log has in place of a model, where it is about none.
    """

    keys: Mapping[str, str]
    fingerprint: Fingerprint
    number: int = 0
    about: str = ""

    @property
    def model(self) -> str:
        """The model it is about, or what else."""
        return self.keys.get("model", self.about)

    @property
    def layer(self) -> str:
        """The layer it is about; empty where it is about none."""
        return self.keys.get("layer", "")

    def columns(self, table: pa.Table) -> dict[str, object]:
        """The columns of a table, with those of the partition before."""
        keys: dict[str, object] = {name: [value] * len(table) for name, value in self.keys.items()}
        return keys | {name: table[name] for name in table.column_names}

    def piece(self, shard: str) -> str:
        """Where the work holds a shard's part of it."""
        return f"{PIECES}/{self.number}/{shard}"


@dataclass(frozen=True)
class Stream:
    """An output that is too large to be held as a whole.

    Attributes:
        pieces: Its rows, in order.
        metadata: Of its file.
    """

    pieces: Iterator[pa.Table]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Shard:
    """A piece of work: the unit of retry and of progress. Its composition never depends on the cluster.

    Attributes:
        name: Its name in the work.
        outputs: Numbers of the outputs it has a part of.
        row: What its worker needs besides, JSON-able.
        size: How much it is, in what the stage counts.
    """

    name: str
    outputs: tuple[int, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1


class Known:
    """What is known of tables that a stage is made of: here, what the storage holds.

    A dry run knows more: what stages before it would have made (:mod:`milan_ray.engine.planner`).

    Args:
        storage: The run directory.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def config(self, table: Table, **keys: str) -> str:
        """Configuration hash of a partition.

        Raises:
            MilanError: There is none.
        """
        self._check_there(table, keys)
        return self.storage.config_of(table, **keys)

    def all_units(self, table: Table, **keys: str) -> str:
        """The same of all units of its layer, where it has some of them alone."""
        self._check_there(table, keys)
        return self.storage.all_units_of(table, **keys)

    def _check_there(self, table: Table, keys: Mapping[str, str]) -> None:
        verb = _MADE_BY.get(table.name)
        if verb is not None and self.storage.metadata(table, **keys) is None:
            of = " ".join(keys.values())
            raise MilanError(f"no {table.name} of {of} in {self.storage.root}; run jobs.{verb} first.")

    def check_units(self, units: tuple[int, ...], model: str, layer: str) -> None:
        """Refuses units that a layer does not have.

        Raises:
            MilanError: It has not one of them.
        """
        check_units(units, self.storage.count(LEVELS, model=model, layer=layer), model, layer)


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    Attributes:
        storage: The run directory.
        work: Hash of its work in progress.
        every: All outputs.
        due: Those to make.
        resources: What of the cluster to use.
    """

    storage: Storage
    work: str
    every: Sequence[Output]
    due: Sequence[Output]
    resources: Resources


class Stage(ABC):
    """What makes the partitions of one table.

    Attributes:
        table: The table.
        name: Its name in the run log.
        title: Its name in messages.
    """

    table: ClassVar[Table]
    name: str
    title: str

    @abstractmethod
    def outputs(self, known: Known) -> Iterator[Output]:
        """The partitions there will be, and what decides each."""

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why an output has to be made; None when it is current."""
        return storage.why(self.table, output.fingerprint, **output.keys)

    def check(self, storage: Storage) -> None:
        """Refuses to run where something is missing that a dry run cannot know of yet.

        Raises:
            MilanError: It is missing.
        """
        return


class ShardedStage(Stage):
    """A stage whose outputs are cut into shards.

    Attributes:
        worker: Class of the workers: ``worker(storage, work, threads, device, **arguments)(row)`` does a shard. Its row
            has the shard's ``name`` and ``outputs`` besides its own. It stores a piece for each output, and may answer
            how many ``images`` it took.
        label: Its name before figures of progress.
        counted: What progress counts.
        recorded: Whether the run log has a row for each output.
        uses_gpus: Whether the workers compute on GPUs where the cluster has some.
    """

    worker: ClassVar[type]
    label: str
    counted: ClassVar[str]
    recorded: ClassVar[bool] = True
    uses_gpus: ClassVar[bool] = True

    @abstractmethod
    def shards(self, job: Job) -> list[Shard]:
        """Cuts the outputs that are due."""

    @abstractmethod
    def arguments(self, job: Job) -> dict[str, Any]:
        """What the workers are made with, besides storage, work, threads and device."""

    @abstractmethod
    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table | Stream:
        """An output, put together from its pieces in the order of the shards."""

    def announce(self, job: Job, shards: Sequence[Shard]) -> str:
        """What is said before the shards that are not stored yet are run."""
        return f"{self.title}: {len(job.due)} layers of {len({output.model for output in job.due})} models"

    def little(self, shards: Sequence[Shard]) -> bool:
        """Whether these shards are so little that the driver runs them whatever the resources are."""
        return False

    @abstractmethod
    def few(self, job: Job, shards: Sequence[Shard]) -> bool:
        """Whether there is so little to merge that the driver does it: workers take longer to start."""


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
        remark: What people should know before it runs; empty for nothing.
    """

    recorded: ClassVar[bool] = False
    remark: str = ""

    @abstractmethod
    def make(self, storage: Storage, output: Output) -> pa.Table:
        """An output."""

    @abstractmethod
    def few(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """Whether these are so little that the driver makes them."""


RunnableStage = ShardedStage | StepStage | TaskStage
"""A stage that :func:`run_stage` runs."""


@retry_if_overtaken
def run_stage(stage: RunnableStage, storage: Storage, resources: Resources) -> list[Output]:
    """Makes every output of a stage that is missing or stale.

    Args:
        stage: The stage.
        storage: The run directory.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        All its outputs.

    Raises:
        MilanError: What it is made of is missing, or a worker failed.
    """
    stage.check(storage)
    every = numbered(stage, storage)
    due = [output for output in every if stage.why(storage, output)]
    if isinstance(stage, TaskStage):
        if stage.remark:
            say(stage.remark)
        tasks = [_Task(stage, storage, output) for output in due]
        for _ in run_parallel(_run_task, tasks, here=stage.few(storage, every)):
            pass
        return every
    work = _work(stage, every)
    if due:
        job = Job(storage, work, every, due, resources)
        with removed_if_damaged(storage, work):
            if isinstance(stage, StepStage):
                stage.run(job)
            else:
                _make(stage, job)
    else:
        if isinstance(stage, StepStage):
            stage.clean_up(storage)
        say(f"{stage.title}: all up to date")
    storage.remove_work(work)
    return every


def numbered(stage: Stage, storage: Storage) -> list[Output]:
    """All outputs of a stage, each with its place among them."""
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
    storage, work = job.storage, job.work
    output_of = {output.number: output for output in job.due}
    shards = stage.shards(job)
    stored = set(storage.work_names(work, PIECES))
    fresh = [
        shard for shard in shards if any(output_of[number].piece(shard.name) not in stored for number in shard.outputs)
    ]
    say(stage.announce(job, fresh))
    costs = {number: Cost() for number in output_of}
    rows: list[Row] = [{**shard.row, "name": shard.name, "outputs": shard.outputs} for shard in fresh]
    resources = job.resources if stage.uses_gpus else replace(job.resources, device="cpu", gpus_per_actor=None)
    arguments = {
        **stage.arguments(job),
        "storage": storage,
        "work": work,
        "threads": resources.threads,
        "device": resources.device,
    }
    shard_of = {shard.name: shard for shard in fresh}
    layers = {number: (output.model, output.layer) for number, output in output_of.items()}
    pieces = (layers[number] for shard in fresh for number in shard.outputs)
    with Progress(stage.label, sum(shard.size for shard in fresh), stage.counted, pieces) as progress:
        for answer in run_pool(stage.worker, arguments, rows, resources, stage.little(shards)):
            shard = shard_of[answer["name"]]
            progress.advance(shard.size, (layers[number] for number in shard.outputs))
            for number in shard.outputs:
                costs[number].add(answer["seconds"], len(shard.outputs), answer.get("images", 0))
    names: dict[int, list[str]] = {number: [] for number in output_of}
    for shard in shards:
        for number in shard.outputs:
            names[number].append(shard.name)
    merges = [
        _Merge(stage, storage, work, output, tuple(names[output.number]), costs[output.number]) for output in job.due
    ]
    for _ in run_parallel(_merge, merges, here=stage.few(job, shards)):
        pass


@dataclass(frozen=True)
class _Merge:
    stage: ShardedStage
    storage: Storage
    work: str
    output: Output
    names: tuple[str, ...]
    cost: Cost


def _merge(task: _Merge) -> None:
    """Puts an output together and makes it public."""
    stage, storage, output = task.stage, task.storage, task.output
    pieces = (storage.get_work(task.work, output.piece(name)) for name in task.names)
    merged = stage.merge(storage, output, pieces)

    def record(rows: int) -> None:
        if stage.recorded:
            about = output.model
            record_run(
                storage, stage.name, output.fingerprint.hash, about, layer=output.layer, rows=rows, cost=task.cost
            )

    if isinstance(merged, Stream):
        counted = _counted(merged.pieces, record)
        storage.write_stream(stage.table, counted, output.fingerprint, merged.metadata, **output.keys)
    else:
        record(len(merged))
        storage.write(stage.table, merged, output.fingerprint, **output.keys)


def _counted(pieces: Iterator[pa.Table], then: Callable[[int], None]) -> Iterator[pa.Table]:
    """The same pieces; their rows are counted, and said before the file they go to is whole."""
    rows = 0
    for piece in pieces:
        rows += len(piece)
        yield piece
    then(rows)


@dataclass(frozen=True)
class _Task:
    stage: TaskStage
    storage: Storage
    output: Output


def _run_task(task: _Task) -> None:
    stage, output, started = task.stage, task.output, time.monotonic()
    table = stage.make(task.storage, output)
    if stage.recorded:
        cost, run = Cost(), output.fingerprint.hash
        cost.add(time.monotonic() - started)
        record_run(task.storage, stage.name, run, output.model, layer=output.layer, rows=len(table), cost=cost)
    task.storage.write(stage.table, table, output.fingerprint, **output.keys)
