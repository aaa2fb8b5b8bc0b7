"""Memory is bounded whatever the probe's size: 50,000 images go through, and nothing grows with them.

What counts is what a process has for itself (RssAnon) and what lies in the object store (RssShmem). Peaks of all
resident memory (VmHWM) say less: pages of libraries come and go with it, 100 MiB at the end of a process alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from milan_ray.schema import EXEMPLARS, LEVELS, POOLED
from milan_ray.storage import Storage

PLUGIN = Path(__file__).resolve().parents[1] / "plugins/noise_probe.py"
IMAGES = 50_000
MIB = 2**20
LIMIT = 768 * MIB
"""Bytes that no process of the job may ever have for itself, torch and Ray included."""

JOB = """
import json, os, sys, threading
from pathlib import Path
from milan_ray import runtime
runtime.prepare(None)
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected, start
from milan_ray.stages.exemplars import Exemplars
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.storage import Storage

plugin, folder, images, result = sys.argv[1:]
mine = str(os.getpid())
samples = []  # how many shards are done; process, private bytes, shared bytes

def read(pid):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")], fields["PPid"].strip()

def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\\0", " ")

def processes():
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                yield path.name, command(path.name), *read(path.name)
            except (OSError, KeyError, ValueError):  # ended meanwhile, or one of the kernel's
                continue

def watch():
    while not stop.wait(0.2):
        done = len(list(Path(folder).glob("_work/*/pieces/*/*.parts")))
        for pid, said, found, parent in processes():
            if pid == mine:
                samples.append((done, "driver", *found))
            elif parent == raylet and said.startswith("ray::"):
                samples.append((done, "actor" if "ExemplarWorker" in said else "worker", *found))
            elif pid == raylet:
                samples.append((done, "raylet", *found))

with connected(Resources(actors=1)):
    start()
    raylet = next(pid for pid, said, _, parent in processes() if "/raylet/raylet" in said and parent == mine)
    stop = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    Exemplars(
        [ModelRef("noise/net", plugins=(plugin,))],
        ProbeRef((f"noise/{images}",), plugins=(plugin,)),
        ExemplarConfig(k=3, pooled=True),
    ).run(Storage(folder), Resources(actors=1))
    stop.set()
    thread.join()
Path(result).write_text(json.dumps(samples))
"""


def private(samples: list, process: str, since: float, until: float) -> float:
    """Median of a process's own bytes while so much of the probe was done."""
    most = max(done for done, *_ in samples)
    span = [anon for done, who, anon, _ in samples if who == process and since * most <= done < until * most]
    return median(span)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of processes from /proc")
def test_memory_and_object_store_do_not_grow_with_the_probe(tmp_path):
    result, folder = tmp_path / "result", tmp_path / "run"
    command = [sys.executable, "-c", JOB, str(PLUGIN), str(folder), str(IMAGES), str(result)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    samples = json.loads(result.read_text())

    storage, keys = Storage(folder), {"model": "noise/net", "layer": "0"}
    assert min(storage.read(LEVELS, **keys)["positions"].to_pylist()) >= 2**20  # 36 an image: not all are counted
    assert (storage.count(EXEMPLARS, **keys), storage.count(POOLED, **keys)) == (8 * 3, IMAGES)

    assert max(anon for _, _, anon, _ in samples) < LIMIT
    # The activations of the images in between are 33 MiB, their tables of pooled activations 2 MiB.
    for process in ("actor", "driver"):
        assert private(samples, process, 0.8, 1) - private(samples, process, 0.2, 0.4) < 12 * MIB, process
    # Whoever writes to the object store or reads from it has its pages: small objects never get there.
    assert max(shared for *_, shared in samples) < 4 * MIB
    # Afterwards the driver brings the manifest up to date: some hundred bytes per image.
    peak = max(anon for _, who, anon, _ in samples if who == "driver")
    assert peak - private(samples, "driver", 0.8, 1) < 64 * MIB
