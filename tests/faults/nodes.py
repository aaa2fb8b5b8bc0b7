"""Run by a test: exemplars on a cluster of which one node is lost in the middle, and which another one joins.

``python nodes.py RESULT STORAGE PHOTOS PLUGIN`` writes the ids of head, lost and joined node as JSON. All passes wait
at the gate until the joined node has begun one: the lost node is lost in the middle of a pass, and none is left over.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from gates import wait_until
from ray.cluster_utils import Cluster

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage


def main(result: str, root: str, photos: str, plugin: str) -> None:
    """Runs it."""
    storage = Storage(root)
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    lost = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    request, probe = ModelRef("slow/cnn", plugins=(plugin,)), ProbeRef((photos,))
    config = ExemplarConfig(k=4, batch_size=16, shard_size=1)
    job = threading.Thread(target=Exemplars([request], probe, config).run, args=(storage, Resources(actors=3)))
    job.start()
    where = Path(os.environ["MILAN_TEST_WHERE"])

    def wait_for(*nodes: str) -> None:
        def begun() -> bool:
            assert job.is_alive(), "the job was over too early"
            return where.exists() and set(nodes) <= set(where.read_text().split())

        wait_until(begun, "all these nodes have begun a pass")

    head_node: Any = cluster.head_node  # Ray declares it as None
    head = head_node.node_id
    wait_for(head, lost.node_id)
    cluster.remove_node(lost, allow_graceful=False)
    joined = cluster.add_node(**node)
    wait_for(joined.node_id)
    Path(os.environ["MILAN_TEST_GATE"]).touch()
    job.join()
    Path(result).write_text(json.dumps([head, lost.node_id, joined.node_id]))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
