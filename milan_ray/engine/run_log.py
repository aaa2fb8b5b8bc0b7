"""The run log: which stage ran, when, how long and with which versions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version

import torch

import milan_ray
from milan_ray.schema import RUNS
from milan_ray.schema.operations import SHARES
from milan_ray.storage import Storage


@dataclass
class Cost:
    """Work that a table took before it was merged, in seconds of one worker.

    Attributes:
        seconds: Work for this table alone, and an equal share of the work for several tables.
        whole: Work for this table alone, and all of the work for several tables.
        images: Images used; 0 where none are read.
    """

    seconds: float = 0.0
    whole: float = 0.0
    images: int = 0

    def add(self, seconds: float, tables: int = 1, images: int = 0) -> None:
        """Adds a piece of work.

        Args:
            seconds: Its duration.
            tables: Number of tables that share it.
            images: Images used.
        """
        self.seconds += seconds / tables
        self.whole += seconds
        self.images += images


def record_run(storage: Storage, stage: str, run: str, model: str, *, rows: int, cost: Cost, layer: str = "") -> None:
    """Writes one row of the run log, as a partition that is replaced when the same work is done again.

    A stage calls this right before it writes the table that the row describes. A job that is killed in between makes
    both again, so no table is ever without its row.

    Args:
        storage: The run directory.
        stage: The stage.
        run: Configuration hash of the table's partition.
        model: Name of the model, or another name where there is no model.
        rows: Rows written.
        cost: Work that the table took.
        layer: Module path; empty for a run of several layers or none.
    """
    versions = {"milan_ray": milan_ray.__version__, "torch": torch.__version__, "ray": version("ray")}
    row = RUNS.table(
        {
            "stage": [stage],
            "run": [run],
            "model": [model],
            "layer": [layer],
            "rows": [rows],
            "images": [cost.images],
            "seconds": [cost.seconds],
            "images_per_second": [cost.images / cost.whole if cost.images and cost.whole else None],
            "finished_at": [datetime.now(timezone.utc).isoformat(timespec="seconds")],
            "versions": [json.dumps(versions, sort_keys=True)],
        },
        SHARES,
    )
    storage.write(RUNS, row, run, stage=stage, run=run, model=model)
