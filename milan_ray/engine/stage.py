"""Stages: each declares its outputs once, for runs and dry runs alike; the runner does everything else.

A :class:`Stage` makes the partitions of one table. ``outputs()`` says which there will be and what decides each. A
:class:`ShardedStage` also cuts the missing ones into shards, has a worker that does a shard, and merges the pieces.
:func:`run_stage` asks which outputs are due and why, runs the shards that are not stored yet on a pool of actors or
threads, merges, writes each table with its fingerprint and its row of the run log, retries when another job on the same
storage was faster, and removes the work in progress on every way out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyarrow as pa

from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.references import check_units
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import beside_others, removed_if_damaged, run_parallel
from milan_ray.progress import Progress, say
from milan_ray.schema import LEVELS, Noun
from milan_ray.storage import Storage

PIECES = "pieces"
"""Folder of finished pieces in the work of a stage: one folder per output, one file per shard."""


@dataclass(frozen=True)
class Output:
    """One partition that a stage makes.

    Attributes:
        keys: Its partition.
        recipe: What decides its content.
        number: Its place among the stage's outputs, which the runner tells it.
    """

    keys: Mapping[str, str]
    recipe: Recipe
    number: int = 0

    @property
    def model(self) -> str:
        """The model it is about; empty where it is about none."""
        return self.keys.get("model", "")

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

    def config(self, table: Noun, **keys: str) -> str:
        """Configuration hash of a partition.

        Raises:
            MilanError: There is none.
        """
        return self.storage.config_of(table, **keys)

    def whole(self, table: Noun, **keys: str) -> str:
        """The same of all units of its layer, where it has some of them alone."""
        return self.storage.whole_of(table, **keys)

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
    """

    table: ClassVar[Noun]
    name: str
    """Its name in the run log."""

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.name

    @property
    def label(self) -> str:
        """Its name before figures of progress."""
        return self.name

    @abstractmethod
    def outputs(self, known: Known) -> Iterator[Output]:
        """The partitions there will be, and what decides each."""


class ShardedStage(Stage):
    """A stage whose outputs are cut into shards.

    Attributes:
        counted: What progress counts.
    """

    counted: ClassVar[str]

    @property
    @abstractmethod
    def worker(self) -> type:
        """Class of the workers: ``worker(storage, work, threads, device, **arguments)(row)`` does a shard.

        Its row has the shard's ``name`` and ``outputs`` besides its own. It stores a piece for each output, and may
        answer how many ``images`` it took.
        """

    @abstractmethod
    def shards(self, job: Job) -> list[Shard]:
        """Cuts the outputs that are due."""

    @abstractmethod
    def arguments(self, job: Job) -> dict[str, Any]:
        """What the workers are made with, besides storage, work, threads and device."""

    @abstractmethod
    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """An output, put together from its pieces in the order of the shards."""

    def announce(self, job: Job, shards: Sequence[Shard]) -> str:
        """What is said before the shards that are not stored yet are run."""
        return f"{self.title}: {len(job.due)} layers of {len({output.model for output in job.due})} models"

    @abstractmethod
    def few(self, job: Job, shards: Sequence[Shard]) -> bool:
        """Whether there is so little to merge that the driver does it: workers take longer to start."""


class TaskStage(Stage):
    """A stage that makes each output by one task, of which the run log knows nothing: it takes no time."""

    @property
    def remark(self) -> str:
        """What people should know before it runs; empty for nothing."""
        return ""

    @abstractmethod
    def make(self, storage: Storage, output: Output) -> pa.Table:
        """An output."""

    @abstractmethod
    def few(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """Whether these are so little that the driver makes them."""


@beside_others
def run_stage(stage: ShardedStage | TaskStage, storage: Storage, resources: Resources) -> list[Output]:
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
    every = [replace(output, number=n) for n, output in enumerate(stage.outputs(Known(storage)))]
    due = [output for output in every if storage.why(stage.table, output.recipe, **output.keys)]
    if isinstance(stage, TaskStage):
        if stage.remark:
            say(stage.remark)
        tasks = [_Task(stage, storage, output) for output in due]
        for _ in run_parallel(_run_task, tasks, here=stage.few(storage, every)):
            pass
        return every
    # Over all outputs, so that a job killed while results become public finds its pieces again.
    work = config_hash({stage.name: [output.recipe.hash for output in every]})
    if due:
        with removed_if_damaged(storage, work):
            _make(stage, Job(storage, work, every, due, resources))
    else:
        say(f"{stage.title}: all up to date")
    storage.remove_work(work)
    return every


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
    arguments = {
        **stage.arguments(job),
        "storage": storage,
        "work": work,
        "threads": job.resources.threads,
        "device": job.resources.device,
    }
    shard_of = {shard.name: shard for shard in fresh}
    layers = {number: (output.model, output.layer) for number, output in output_of.items()}
    pieces = (layers[number] for shard in fresh for number in shard.outputs)
    with Progress(stage.label, sum(shard.size for shard in fresh), stage.counted, pieces) as progress:
        for answer in run_pool(stage.worker, arguments, rows, job.resources):
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
    table = stage.merge(storage, output, pieces)
    record_run(
        storage, stage.name, output.recipe.hash, output.model, layer=output.layer, rows=len(table), cost=task.cost
    )
    storage.write(stage.table, table, output.recipe, **output.keys)


@dataclass(frozen=True)
class _Task:
    stage: TaskStage
    storage: Storage
    output: Output


def _run_task(task: _Task) -> None:
    table = task.stage.make(task.storage, task.output)
    task.storage.write(task.stage.table, table, task.output.recipe, **task.output.keys)
