"""Exemplars of whole models over a sharded probe: one pass, all layers, any number of actors, the same tables.

manifest ─► shards ─► [actor pool: forward, top-k, levels] ─► partials ─► [merge per layer] ─► exemplars, levels
                                                                 ├─► images read: skipped, sha256
                                                                 └─► [concatenated] ─► pooled, when asked for
winners ─► [recompute masks of layers too large to carry maps] ─► exemplars
winners ─► [views, once per image and geometry]
"""

from milan_ray.stages.exemplars.describe_model import describe_model, exemplar_fingerprints
from milan_ray.stages.exemplars.stage import DissectedModels, Exemplars, rerun_work, run_shards, store_manifest
from milan_ray.stages.exemplars.worker import ModelWork, ModelWorker, Run, ShardsWorker, failing, shard_name

__all__ = [
    "DissectedModels",
    "Exemplars",
    "ModelWork",
    "ModelWorker",
    "Run",
    "ShardsWorker",
    "describe_model",
    "exemplar_fingerprints",
    "failing",
    "rerun_work",
    "run_shards",
    "shard_name",
    "store_manifest",
]
