"""Memory is bounded whatever the probe's size: ten times the images, the same peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.storage import Storage

PLUGIN = Path(__file__).resolve().parents[1] / "plugins/noise_probe.py"
FEW, MANY = 5_000, 50_000
MIB = 2**20
LIMIT = 1024 * MIB
"""Bytes of resident memory that no process of the job may ever exceed, torch and Ray included."""

JOB = """
import json, os, sys, threading
from pathlib import Path
from milan_ray import runtime
runtime.prepare(None)
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.pipelines.cluster import connected
from milan_ray.pipelines.exemplars import run_exemplars
from milan_ray.pipelines.requests import ModelRequest, ProbeRequest
from milan_ray.storage import Storage

plugin, folder, *sizes = sys.argv[1:]
peaks = {}  # process -> most resident memory, bytes

def read(pid):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssShmem")} | {"parent": fields["PPid"]}

def sample():
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                command = (path / "cmdline").read_text()
                found = read(path.name)
            except (OSError, KeyError, ValueError):  # ended meanwhile, or one of the kernel's
                continue
            if path.name == str(os.getpid()):
                peaks["driver"] = max(peaks.get("driver", 0), found["VmHWM"])
            elif found["parent"].strip() == raylet and command.startswith("ray::"):
                peaks["workers"] = max(peaks.get("workers", 0), found["VmHWM"])
            elif path.name == raylet:
                peaks["object store"] = max(peaks.get("object store", 0), found["RssShmem"])

def watch():
    while not stop.wait(0.1):
        sample()

with connected(Resources(actors=1)):
    children = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    mine = str(os.getpid())
    raylet = next(
        p.name for p in children
        if "/raylet/raylet" in (p / "cmdline").read_text().split("\\0")[0] and read(p.name)["parent"].strip() == mine
    )
    for size in map(int, sizes):
        stop = threading.Event()
        thread = threading.Thread(target=watch)
        thread.start()
        run_exemplars(
            Storage(f"{folder}/{size}"),
            [ModelRequest("noise/net", plugins=(plugin,))],
            ProbeRequest((f"noise/{size}",), plugins=(plugin,)),
            ExemplarConfig(k=3),
            Resources(actors=1),
        )
        stop.set()
        thread.join()
        print(json.dumps(peaks), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of processes from /proc")
def test_memory_and_object_store_do_not_grow_with_the_probe(tmp_path):
    command = [sys.executable, "-c", JOB, str(PLUGIN), str(tmp_path), str(FEW), str(MANY)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (json.loads(line) for line in done.stdout.splitlines())
    levels = Storage(tmp_path / str(MANY)).read(LEVELS, model="noise/net", layer="0")
    assert min(levels["positions"].to_pylist()) >= 2**20  # 36 per image: too many for all of them to count
    assert Storage(tmp_path / str(MANY)).count(EXEMPLARS, model="noise/net", layer="0") == 8 * 3
    assert max(many["driver"], many["workers"]) < LIMIT
    assert many["workers"] - few["workers"] < 48 * MIB
    assert many["driver"] - few["driver"] < 96 * MIB  # the manifest: some hundred bytes per image
    assert many["object store"] - few["object store"] < 4 * MIB
