"""The runs table: what ran, when, how long, with which versions."""

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
    """What a table took before it was put together, in seconds of one worker.

    Attributes:
        seconds: What was done for this table alone, and its share of what was done for several.
        whole: The same with all of what was done for several.
        images: Images used; 0 where none are read.
    """

    seconds: float = 0.0
    whole: float = 0.0
    images: int = 0

    def add(self, seconds: float, tables: int = 1, images: int = 0) -> None:
        """Adds a piece of work.

        Args:
            seconds: What it took.
            tables: How many tables it was done for.
            images: Images that it used.
        """
        self.seconds += seconds / tables
        self.whole += seconds
        self.images += images


def record_run(storage: Storage, stage: str, run: str, model: str, *, rows: int, cost: Cost, layer: str = "") -> None:
    """Writes one row of the runs table: a partition of its own, replaced when the same work is done again.

    A stage calls this right before it writes the table that the row is about: a job that is killed in between makes
    both again, and no table is ever without its row.

    Args:
        storage: The run directory.
        stage: What ran.
        run: Configuration hash of what was made.
        model: Name of the model, or of what else it is about.
        rows: Rows written.
        cost: What it took.
        layer: Module path; empty where the run is not of one layer.
    """
    versions = {"milan_ray": milan_ray.__version__, "torch": torch.__version__, "ray": version("ray")}
    table = RUNS.table(
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
    storage.write(RUNS, table, run, stage=stage, run=run, model=model)
