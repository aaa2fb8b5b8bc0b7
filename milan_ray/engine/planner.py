"""Dry runs: compares the stages' outputs with the storage. Starts no Ray and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from milan_ray.config import Fingerprint
from milan_ray.engine.stage import Known, Stage
from milan_ray.schema import EXEMPLARS, Table
from milan_ray.storage import Storage

NETWORKS = "networks"
"""Stands in a step for a table's name: networks to train first, which are stored with the models."""

DOWNLOADS = "downloads"
"""Stands in a step for a table's name: files to download first."""


@dataclass(frozen=True)
class Step:
    """One partition that a job would make, or that is up to date.

    Attributes:
        table: Name of the table.
        keys: Values of the partition keys.
        reason: Why the partition would be made; None when it is up to date.
    """

    table: str
    keys: tuple[str, ...]
    reason: str | None


@dataclass
class Plan:
    """The steps of a job.

    Attributes:
        steps: Its partitions, in the order of the stages.
        later: Partitions, or groups of them, whose fingerprints depend on tables that do not exist yet, so that it is
            not known whether they would be made.
        failed: Model → why it would be skipped.
        made: (table, partition) → fingerprint of a partition after the job.
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
        """A line for each step that would run or is not known yet, and a line of totals."""
        due = self.due
        rows = [(step.table, " ".join(step.keys), step.reason) for step in (*due, *self.later)]
        rows += [("skipped", name, reason) for name, reason in self.failed.items()]
        width = max((len(where) for _, where, _ in rows), default=0)
        lines = [f"{table:12}  {where:{width}}  {reason}" for table, where, reason in rows]
        current = len(self.steps) - len(due)
        after = f", {len(self.later)} depend on them" if self.later else ""
        what = "tables"
        for kind in (NETWORKS, DOWNLOADS):
            if any(step.table == kind for step in self.steps):
                what = f"{kind} and tables"
        totals = f"{len(due)} {what} would be made, {current} are up to date{after}; nothing was done."
        return "\n".join([*lines, totals])

    def stages(self, storage: Storage, stages: Iterable[Stage]) -> None:
        """Adds all outputs of stages, in the order in which they run and each once, and the models that failed."""
        for stage in stages:
            for output in stage.outputs(Planned(storage, self)):
                table = output.table or stage.table
                step = Step(table.name, tuple(output.keys.values()), stage.why(storage, output))
                self.steps += [] if step in self.steps else [step]
                self.made[_key(table, output.keys)] = output.fingerprint
            self.failed |= stage.failed

    def waits(self, table: str, keys: tuple[str, ...], *before: str, of: str | None = None) -> bool:
        """Adds a table to those not known yet when it depends on tables that would be made first.

        Args:
            table: Name of the table.
            keys: Its partition keys, or a text for several partitions.
            *before: Names of the tables that it depends on.
            of: A key value that the partitions of these must have to count, such as a model; None for any.

        Returns:
            Whether one of these would be made, so that the fingerprint is unknown.
        """
        for ahead in (self.due, self.later):
            tables = {step.table for step in ahead if of is None or of in step.keys}
            if first := [name for name in before if name in tables]:
                step = Step(table, keys, f"not known before: {', '.join(first)}")
                self.later += [] if step in self.later else [step]
                return True
        return False


class Planned(Known):
    """Fingerprints of tables after a plan: those that it makes, and the others in the storage.

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
        """Configuration hash that a partition would have with all units of its layer."""
        made = self._plan.made.get(_key(table, keys))
        return super().all_units(table, **keys) if made is None else made.all_units

    def pending(self, table: Table) -> bool:
        """Whether the plan so far makes partitions of a table."""
        return any(step.table == table.name for step in self._plan.due)

    def check_units(self, units: tuple[int, ...], model: str, layer: str) -> None:
        """Refuses units that a layer does not have, unless its exemplars are still to be made."""
        due = {step.keys for step in self._plan.due if step.table == EXEMPLARS.name}
        if (model, layer) not in due:
            super().check_units(units, model, layer)


def _key(table: Table, keys: Mapping[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return table.name, tuple(sorted(keys.items()))
