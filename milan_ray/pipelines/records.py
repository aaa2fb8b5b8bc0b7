"""The runs table: what ran, when, how long, with which versions."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from importlib.metadata import version

import torch

import milan_ray
from milan_ray.schema import RUNS
from milan_ray.storage import Storage


def record_run(
    storage: Storage, stage: str, run: str, model: str, *, rows: int, images: int, seconds: float, layer: str = ""
) -> None:
    """Writes one row of the runs table: a partition of its own, replaced when the same work is done again.

    Args:
        storage: The run directory.
        stage: What ran.
        run: Configuration hash of what was made.
        model: Name of the model, or of what else it is about.
        rows: Rows written.
        images: Images used; 0 where the stage reads none.
        seconds: What it took.
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
            "images": [images],
            "seconds": [seconds],
            "images_per_second": [images / seconds if images and seconds else None],
            "finished_at": [datetime.now(timezone.utc).isoformat(timespec="seconds")],
            "versions": [json.dumps(versions, sort_keys=True)],
        }
    )
    storage.write(RUNS, table, run, stage=stage, run=run, model=model)
