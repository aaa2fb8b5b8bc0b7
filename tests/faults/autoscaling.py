"""Run by a test: exemplars on a cluster that has no worker yet, as an autoscaler of fake nodes gives it some.

``python autoscaling.py ADDRESS RESULT STORAGE PHOTOS PLUGIN`` writes, as JSON, the nodes that there were before, those
that ran shards, and those that were left when idle ones had gone. All passes wait at the gate until two nodes have
begun one: else the first could be done before the second is up.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import ray
from gates import wait_until

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage


def alive() -> int:
    """Nodes of the cluster."""
    return sum(node["Alive"] for node in ray.nodes())


def main(address: str, result: str, root: str, photos: str, plugin: str) -> None:
    """Runs it."""
    ray.init(address=address, log_to_driver=False)
    before = alive()
    request, probe = ModelRef("slow/cnn", plugins=(plugin,)), ProbeRef((photos,))
    config, resources = ExemplarConfig(k=4, batch_size=16, shard_size=1), Resources(actors=2)
    job = threading.Thread(target=Exemplars([request], probe, config).run, args=(Storage(root), resources))
    job.start()
    where = Path(os.environ["MILAN_TEST_WHERE"])
    wait_until(
        lambda: not job.is_alive() or (where.exists() and len(set(where.read_text().split())) > 1),
        "a second node has begun a pass",
    )
    Path(os.environ["MILAN_TEST_GATE"]).touch()
    job.join()
    ray.shutdown()  # its pool goes with the driver
    ray.init(address=address, log_to_driver=False)
    wait_until(lambda: alive() <= before, "idle nodes are gone")
    ran = set(where.read_text().split())
    Path(result).write_text(json.dumps({"before": before, "ran": len(ran), "after": alive()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
