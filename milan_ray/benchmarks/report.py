"""Benchmark of the report of a synthetic model zoo: seconds, memory, files and bytes."""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.benchmarks.harness import Options, Result, alone, elapsed, peak_memory
from milan_ray.report import write_report
from milan_ray.schema import DESCRIPTIONS, ENCODINGS, EXEMPLARS, LEVELS, MANIFEST, UNIT_SCORES, VIEWS, Table
from milan_ray.storage import Storage

PROBE, VIEW = "synthetic", "synthetic-view"
LABELERS = ("milan", "milan-pdE")

_BLOCK = 256  # images
_MASKS = 509  # distinct masks; a prime, so that every unit gets other ones
_CANDIDATES = 10
_KINDS = {"indices": "units.js", "cards": "cards/*.js", "masks": "masks-*/*.png", "thumbnails": "*.jpg"}
_COLOURS = ("red", "green", "blue", "dark", "bright", "white", "brown", "yellow", "striped", "spotted")
_THINGS = ("areas", "dogs", "eyes", "faces", "grass", "houses", "legs", "letters", "people", "roads", "trees", "wheels")
_PLACES = ("in water", "on grass", "at the edges", "with text", "near people", "in the sky", "and skin", "on walls")


@dataclass(frozen=True)
class Zoo:
    """Size of a model zoo.

    Attributes:
        names: The networks' names.
        widths: Number of units in each of a network's layers.
        images: Number of images in the probe.
        side: Side of a view and a mask, in pixels.
        k: Exemplars per unit.
        features: Dimension of an encoding.
    """

    names: tuple[str, ...] = tuple(f"synthetic/{number}" for number in range(25))
    widths: tuple[int, ...] = (200, 400, 600, 800)
    images: int = 1000
    side: int = 224
    k: int = 15
    features: int = 64

    @property
    def units(self) -> int:
        """Number of units in all networks."""
        return len(self.names) * sum(self.widths)

    @classmethod
    def of(cls, options: Options) -> Zoo:
        """Returns a zoo of 50,000 units, or of 90 in short runs."""
        return cls(cls.names[:3], (10, 20), 12, 24, 3, 4) if options.short else cls()


def run(options: Options) -> Iterator[Result]:
    """Writes the report of the first fifth of a zoo, then of the whole zoo, then of the whole zoo again."""
    zoo = Zoo.of(options)
    with TemporaryDirectory(prefix="milan-report-") as folder:
        root = Path(folder)
        write_zoo(Storage(root / "run"), zoo)
        if not options.short:
            yield _report("a fifth of the zoo", root / "run", root / "fifth", replace(zoo, names=zoo.names[:5]))
        yield _report("the zoo", root / "run", root / "whole", zoo)
        yield _report("the zoo once more, masks and thumbnails kept", root / "run", root / "whole", zoo)


def write_zoo(storage: Storage, zoo: Zoo) -> None:
    """Writes the tables that a report shows, filled with realistic noise that depends only on the network's name.

    Args:
        storage: Run directory to write to.
        zoo: Size of the zoo.
    """
    rng = np.random.default_rng(0)
    ids = np.arange(zoo.images)
    manifest: dict[str, object] = {column.name: [None] * zoo.images for column in MANIFEST.columns}
    paths = [f"class {i % 10}/{i:05d}.jpg" for i in ids]
    manifest |= {"image_id": ids, "root": ["/photos"] * zoo.images, "path": paths}
    storage.write(MANIFEST, MANIFEST.table(manifest), "synthetic", probe=PROBE)
    for block in range(0, zoo.images, _BLOCK):
        part = ids[block : block + _BLOCK]
        where = {"probe": PROBE, "view": VIEW, "block": f"{block // _BLOCK:06d}"}
        images = {"image_id": part, "image": [_picture(rng, zoo.side) for _ in part]}
        _write(storage, VIEWS, where, images, "synthetic")
    masks = [_mask(rng, zoo.side) for _ in range(_MASKS)]
    for model in zoo.names:
        for place, width in enumerate(zoo.widths):
            _write_layer(storage, zoo, masks, model, f"layer{place + 1}", width)


def _write_layer(storage: Storage, zoo: Zoo, masks: list[bytes], model: str, layer: str, width: int) -> None:
    keys, config = {"model": model, "layer": layer}, f"{model} {layer}"
    rng = np.random.default_rng(zlib.crc32(config.encode()))
    unit, rank = np.repeat(np.arange(width), zoo.k), np.tile(np.arange(zoo.k), width)
    exemplars = {
        "unit": unit,
        "rank": rank,
        "image_id": rng.permuted(np.tile(np.arange(zoo.images), (width, 1)), axis=1)[:, : zoo.k].ravel(),
        "activation": -np.sort(-rng.gamma(2.0, 2.0, (width, zoo.k)), axis=1).ravel(),
        "mask": [masks[i] for i in rng.integers(0, _MASKS, len(unit))],
    }
    about = {"mask_height": str(zoo.side), "mask_width": str(zoo.side), "probe": PROBE, "view": VIEW, "k": str(zoo.k)}
    _write(storage, EXEMPLARS, keys, exemplars, config, about)
    levels = {
        "unit": np.arange(width),
        "level": rng.gamma(2.0, 1.0, width),
        "positions": np.full(width, 10**6),
        "nonfinite": np.zeros(width, int),
        "exact": np.ones(width, bool),
    }
    _write(storage, LEVELS, keys, levels, config)
    features = pa.FixedSizeListArray.from_arrays(
        pa.array(rng.standard_normal(len(unit) * zoo.features, np.float32)), zoo.features
    )
    encoded = {"unit": unit, "rank": rank, "feature": features}
    _write(storage, ENCODINGS, {"encoder": "synthetic", **keys}, encoded, config)
    for labeler in LABELERS:
        _describe(storage, rng, {"labeler": labeler, **keys}, width)


def _describe(storage: Storage, rng: np.random.Generator, at: dict[str, str], width: int) -> None:
    """Writes a layer's descriptions and their scores."""
    words = [rng.choice(some, (width, _CANDIDATES)) for some in (_COLOURS, _THINGS, _PLACES)]
    texts = [[" ".join(words_of) for words_of in zip(*unit, strict=True)] for unit in zip(*words, strict=True)]
    scores = -np.sort(rng.gamma(9.0, 2.0, (width, _CANDIDATES)), axis=1)
    keys = ("text", "score", "logp_d_given_e", "logp_d")
    best = [
        [dict(zip(keys, (text, score, score - 1, score - 9), strict=True)) for text, score in zip(*unit, strict=True)]
        for unit in zip(texts, scores.tolist(), strict=True)
    ]
    first = [unit[0] for unit in texts]
    described = {
        "unit": np.arange(width),
        "description": first,
        "score": scores[:, 0],
        "logp_d_given_e": scores[:, 0] - 1,
        "logp_d": scores[:, 0] - 9,
        "lam": np.full(width, 0.2),
        "n_best": best,
    }
    _write(storage, DESCRIPTIONS, at, described, "synthetic")
    systems = ("own", "shuffled", "constant")
    judged = {
        "unit": np.repeat(np.arange(width), len(systems)),
        "system": systems * width,
        "description": np.repeat(first, len(systems)),
        "metric": ["simulation"] * width * len(systems),
        "value": rng.uniform(-1, 1, width * len(systems)),
        "images": np.full(width * len(systems), 1000),
    }
    _write(storage, UNIT_SCORES, {"predictor": "synthetic", **at}, judged, "synthetic")


def _write(
    storage: Storage, table: Table, keys: dict[str, str], columns: dict[str, Any], config: str,
    metadata: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes a partition, whose keys are columns too."""
    length = len(next(iter(columns.values())))
    keyed = {key: pa.repeat(value, length) for key, value in keys.items()}
    storage.write(table, table.table(keyed | columns, metadata), config, **keys)


def _picture(rng: np.random.Generator, side: int) -> bytes:
    """Generates coarse noise as a PNG."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def _mask(rng: np.random.Generator, side: int) -> bytes:
    """Generates a mask: the highest eighth of a smooth map."""
    coarse = Image.fromarray(rng.standard_normal((7, 7), np.float32))
    fine = np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))
    return np.packbits(fine > np.quantile(fine, 7 / 8)).tobytes()


def _report(name: str, root: Path, out: Path, zoo: Zoo) -> Result:
    (seconds, slowest, before), peak = alone(_timed, root, out, list(zoo.names))
    sizes = {path.relative_to(out): path.stat().st_size / 1e6 for path in out.rglob("*") if path.is_file()}
    parts = {kind: sum(size for path, size in sizes.items() if path.match(pattern)) for kind, pattern in _KINDS.items()}
    parts["the rest"] = sum(sizes.values()) - sum(parts.values())
    facts: dict[str, float | str] = {
        "slowest layer, seconds": slowest,
        "peak memory, MB": peak,
        "of it before anything is written, MB": before,
        "files": len(sizes),
        "all bytes, MB": sum(sizes.values()),
        "overview, MB": sizes[Path("index.html")],
        **{f"{kind}, MB": size for kind, size in parts.items()},
    }
    return Result(f"report of {name}: {zoo.units:,} units", (seconds,), (), zoo.units, "units", facts)


def _timed(root: Path, out: Path, models: list[str]) -> tuple[float, float, float]:
    """Writes the report; returns its seconds, those of its slowest layer, and the peak memory before it, in MB."""
    moments: list[float] = []
    before = peak_memory()

    def progress(done: int, layers: int, what: str) -> None:
        moments.append(time.perf_counter())

    seconds = elapsed(lambda: write_report(Storage(root), out, models=models, labelers=LABELERS, progress=progress))
    return seconds, float(np.diff(moments).max()), before
