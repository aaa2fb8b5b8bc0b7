"""What a job would do, and why: the stages' own outputs beside the storage. Starts no Ray, writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from milan_ray.config import Fingerprint
from milan_ray.engine.stage import Known, Stage
from milan_ray.schema import EXEMPLARS, Table
from milan_ray.storage import Storage

NETWORKS = "networks"
"""What stands among the names of tables for networks to be trained first; they lie beside models, not in storages."""

DOWNLOADS = "downloads"
"""The same for files that would be fetched first."""


@dataclass(frozen=True)
class Step:
    """One partition.

    Attributes:
        table: Name of the table.
        keys: Its partition: model and layer, with what else tells it apart.
        reason: Why it would be made; None when it is up to date.
    """

    table: str
    keys: tuple[str, ...]
    reason: str | None


@dataclass
class Plan:
    """What a job would do.

    Attributes:
        steps: Its partitions, in the order of the stages.
        later: Partitions, or groups of them, that are made of what is not there yet: only then can it be told whether
            they would be made.
        failed: Model → why it would be skipped.
        made: (table, partition) → what decides a partition after the job.
    """

    steps: list[Step] = field(default_factory=list)
    later: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    made: dict[tuple[str, tuple[tuple[str, str], ...]], Fingerprint] = field(default_factory=dict)

    @classmethod
    def of(cls, storage: Storage, stages: Iterable[Stage]) -> Plan:
        """The plan of stages that follow one another."""
        plan = cls()
        plan.stages(storage, stages)
        return plan

    @property
    def due(self) -> list[Step]:
        """The steps that would run."""
        return [step for step in self.steps if step.reason]

    def text(self) -> str:
        """The steps that would run, a line each, those that cannot be told yet, and how many would not."""
        due = self.due
        rows = [(step.table, " ".join(step.keys), step.reason) for step in (*due, *self.later)]
        rows += [("skipped", name, reason) for name, reason in self.failed.items()]
        width = max((len(where) for _, where, _ in rows), default=0)
        lines = [f"{table:12}  {where:{width}}  {reason}" for table, where, reason in rows]
        current = len(self.steps) - len(due)
        after = f", {len(self.later)} depend on them" if self.later else ""
        what = "tables"
        for others in (NETWORKS, DOWNLOADS):
            if any(step.table == others for step in self.steps):
                what = f"{others} and tables"
        counted = f"{len(due)} {what} would be made, {current} are up to date{after}; nothing was done."
        return "\n".join([*lines, counted])

    def add(self, storage: Storage, table: Table, fingerprint: Fingerprint, **keys: str) -> None:
        """Adds a partition of which it is known what decides it."""
        self.note(table, fingerprint, storage.why(table, fingerprint, **keys), **keys)

    def note(self, table: Table, fingerprint: Fingerprint, reason: str | None, **keys: str) -> None:
        """The same where the reason is known; a partition counts once."""
        step = Step(table.name, tuple(keys.values()), reason)
        self.steps += [] if step in self.steps else [step]
        self.made[_key(table, keys)] = fingerprint

    def stages(self, storage: Storage, stages: Iterable[Stage]) -> None:
        """Adds all outputs of stages that follow one another."""
        for stage in stages:
            for output in stage.outputs(Planned(storage, self)):
                self.note(stage.table, output.fingerprint, stage.why(storage, output), **output.keys)

    def waits(self, table: str, keys: tuple[str, ...], *before: str, of: str | None = None) -> bool:
        """Whether a table is made of others that would be made first, so that its fingerprint is unknown.

        Args:
            table: Its name.
            keys: Its partition, or what stands for several.
            *before: Names of the others.
            of: A key that the others' partitions must have to count, such as a model; None for any.
        """
        for ahead in (self.due, self.later):
            there = {step.table for step in ahead if of is None or of in step.keys}
            if first := [name for name in before if name in there]:
                step = Step(table, keys, f"not known before: {', '.join(first)}")
                self.later += [] if step in self.later else [step]
                return True
        return False


class Planned(Known):
    """What will be known of tables after a plan: what it makes, and what the storage holds besides.

    Args:
        storage: The run directory.
        plan: The plan so far.
    """

    def __init__(self, storage: Storage, plan: Plan) -> None:
        super().__init__(storage)
        self._plan = plan

    def config(self, table: Table, **keys: str) -> str:
        """Configuration hash that a partition will have."""
        made = self._plan.made.get(_key(table, keys))
        return super().config(table, **keys) if made is None else made.hash

    def all_units(self, table: Table, **keys: str) -> str:
        """The same of all units of its layer."""
        made = self._plan.made.get(_key(table, keys))
        return super().all_units(table, **keys) if made is None else made.all_units

    def check_units(self, units: tuple[int, ...], model: str, layer: str) -> None:
        """Refuses units that a layer does not have, as soon as that is known."""
        due = {step.keys for step in self._plan.due if step.table == EXEMPLARS.name}
        if (model, layer) not in due:
            super().check_units(units, model, layer)


def _key(table: Table, keys: dict[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return table.name, tuple(sorted(keys.items()))
