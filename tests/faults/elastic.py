"""Run by tests: exemplars on a cluster that has no worker yet, whose nodes are spot nodes.

``python elastic.py once|every ADDRESS RESULT STORAGE PHOTOS PLUGIN`` writes what happened as JSON.

``once``: all passes wait at the gate until two nodes with GPUs have begun one. Then one of these and a node that reads
for them are lost, and the gate opens when another node has begun a pass: nodes are lost in the middle of their work,
and none of it is left over.

``every``: a node is lost every 20 seconds, whatever it does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from gates import wait_until

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.runtime import prepare
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

HEAD = "node:__internal_head__"
EVERY = 20
"""Seconds between losses."""


def alive() -> dict[str, bool]:
    """Workers of the cluster → whether they have a GPU."""
    nodes = [node for node in ray.nodes() if node["Alive"] and HEAD not in node["Resources"]]
    return {node["NodeID"]: "GPU" in node["Resources"] for node in nodes}


def lose(node: str) -> None:
    """Ends all processes of a fake node, as when its machine is taken away."""
    mark = f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={node}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def once(job: threading.Thread) -> dict[str, Any]:
    """Loses a node of each kind; returns the nodes that ran models, and those that read."""
    where = Path(os.environ["MILAN_TEST_WHERE"])
    readers: set[str] = set()

    def begun(nodes: int) -> set[str]:
        assert job.is_alive(), "the job was over too early"
        readers.update(node for node, gpu in alive().items() if not gpu)
        seen = set(where.read_text().split()) if where.exists() else set[str]()
        return seen if len(seen) >= nodes else set()

    lost = min(wait_until(lambda: begun(2), "two nodes have begun a pass"))
    lose(lost)
    lose(min(readers))
    ran = wait_until(lambda: begun(3), "another node has begun a pass")
    Path(os.environ["MILAN_TEST_GATE"]).touch()
    job.join()
    return {"ran": sorted(ran), "lost": lost, "readers": sorted(readers)}


def every(job: threading.Thread) -> dict[str, Any]:
    """Loses a node again and again; returns how many of each kind, and how long the job took."""
    rng, lost, started = random.Random(0), {"GPU": 0, "CPU": 0}, time.monotonic()
    while job.is_alive():
        job.join(EVERY)
        nodes = alive()
        if job.is_alive() and nodes:
            node = rng.choice(sorted(nodes))
            lose(node)
            lost["GPU" if nodes[node] else "CPU"] += 1
    return {"lost": lost, "seconds": time.monotonic() - started}


def main(how: str, address: str, result: str, root: str, photos: str, plugin: str) -> None:
    """Runs it."""
    prepare(address)
    ray.init(address=address, log_to_driver=False)
    kind, shard = {"once": ("", 1), "every": ("large-", 32)}[how]
    models = [ModelRef(f"slow/{kind}{name}", plugins=(plugin,)) for name in ("cnn", "other")]
    config = ExemplarConfig(k=4, batch_size=16, shard_size=shard)
    stage = Exemplars(models, ProbeRef((photos,)), config)
    resources = Resources(actors=2, gpus_per_actor=1, device="cpu")
    job = threading.Thread(target=stage.run, args=(Storage(root), resources))
    job.start()
    found = {"once": once, "every": every}[how](job)
    ray.shutdown()  # its pool goes with the driver
    ray.init(address=address, log_to_driver=False)
    wait_until(lambda: not alive(), "idle nodes are gone")
    Path(result).write_text(json.dumps({**found, "failed": stage.failed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
