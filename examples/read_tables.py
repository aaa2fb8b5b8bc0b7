"""The Parquet tables of a run directory, read with polars.

    python examples/read_tables.py [STORAGE]

STORAGE is a run directory of yours; without it, one is made in a temporary folder: a random network on 64 scenes of the
built-in world. Tables are hive-partitioned: model and layer are columns. docs/cookbook.md has more recipes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import polars as pl
import torch
from torch import nn

from milan_ray import cli
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe


def build(weights: str | None) -> nn.Module:
    """Returns a random network; the seed makes it the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU())


register_model("random/cnn", build, ["0", "2"], Preprocess(View(resize=64, crop=64)))
register_probe("scenes", lambda: WorldProbe("probe", 64))


def main() -> None:
    """Prints the layers, the units with the clearest favourite image, and the images that excite most units."""
    storage = sys.argv[1] if len(sys.argv) > 1 else str(Path(tempfile.mkdtemp()) / "run")
    if len(sys.argv) == 1:
        job = ["exemplars", "--model", "random/cnn", "--probe", "scenes", "--k", "5", "--plugin", __file__]
        if cli.main([*job, "--storage", storage, "--no-report"]):
            raise SystemExit(1)
    exemplars = pl.scan_parquet(f"{storage}/exemplars/**/*.parquet", hive_partitioning=True)
    levels = pl.scan_parquet(f"{storage}/levels/**/*.parquet", hive_partitioning=True)
    manifest = pl.scan_parquet(f"{storage}/manifest/**/*.parquet", hive_partitioning=True)

    keys = ["model", "layer", "unit"]
    best = exemplars.filter(pl.col("rank") == 0).join(levels, on=keys)
    ratio = (pl.col("activation") / pl.col("level")).alias("activation / level")
    print(best.select(*keys, "image_id", ratio).sort(ratio.meta.output_name(), descending=True).head(5).collect())
    busiest = exemplars.group_by("image_id").agg(pl.len().alias("units")).join(manifest, on="image_id")
    print(busiest.select("path", "class_label", "units").sort("units", "path", descending=True).head(3).collect())
    layers = exemplars.group_by("model", "layer").agg(pl.col("unit").n_unique()).sort("layer").collect()
    print(f"units per layer: {dict(layers.select('layer', 'unit').iter_rows())}")


if __name__ == "__main__":
    main()
