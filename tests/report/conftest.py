from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from judged import judge
from PIL import Image

from milan_ray.report import write_report
from milan_ray.schema import (
    ANNOTATIONS,
    DESCRIPTIONS,
    ENCODINGS,
    EXEMPLARS,
    LEVELS,
    MANIFEST,
    RUNS,
    SCORES,
    SKIPPED,
    UNIT_SCORES,
    VIEWS,
    Table,
)
from milan_ray.scoring.differences import Difference, store
from milan_ray.storage import Storage

SIDE = 20  # pixels of a view and its mask; 400 bits are whole bytes, 20 bits of a row are not
UNITS = 90
EXEMPLARS_EACH = 3
MODEL = "toy/<b>\"x\"&'y'"
LAYERS = ("Conv1", "conv1")
NASTY = "<script>document.title='broken'</script> \"quoted\" & 'single' </script><img src=x onerror=alert(1)>\u2028<!--"


def describe(unit: int) -> str:
    return {7: NASTY, 71: "zebra stripes"}.get(unit, f"{('red', 'green', 'blue')[unit % 3]} thing")


def score(unit: int) -> float:
    return float((unit * 37) % UNITS) - 100.0  # a permutation of the units; unit 17 has the highest


def mask(unit: int, rank: int) -> np.ndarray:
    """Left part of the image, wider with the unit, one row lower with the rank."""
    bits = np.zeros((SIDE, SIDE), bool)
    bits[rank:, : 1 + unit % (SIDE - 1)] = True
    return bits


def pixels(image_id: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), (200, 40 * image_id, 100), np.uint8)


def rows(table: Table, values: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    columns = zip(*values, strict=True)
    return {column.name: list(found) for column, found in zip(table.columns, columns, strict=True)}


def write(
    storage: Storage, table: Table, values: Sequence[tuple[object, ...]], metadata: dict[str, str] | None = None
) -> None:
    data = table.table(rows(table, values), metadata)
    keys = {key: str(data[key][0]) for key in table.partition}
    storage.write(table, data, "a1b2", **keys)


def write_exemplars(storage: Storage) -> None:
    metadata = {"mask_height": str(SIDE), "mask_width": str(SIDE), "view": "toy-view", "probe": "p1", "k": "3"}
    for layer in LAYERS:
        exemplars = [
            (MODEL, layer, u, r, (u + r) % 6, 100.0 + u - r, np.packbits(mask(u, r)).tobytes())
            for u in range(UNITS)
            for r in range(EXEMPLARS_EACH)
        ]
        write(storage, EXEMPLARS, exemplars[::-1], metadata=metadata)
    for block in range(2):
        images = []
        for image_id in range(3 * block, 3 * block + 3):
            png = io.BytesIO()
            Image.fromarray(pixels(image_id)).save(png, "PNG")
            images.append(("p1", "toy-view", str(block), image_id, png.getvalue()))
        write(storage, VIEWS, images)


@pytest.fixture(scope="session")
def hostile() -> str:
    """The description of unit 7, and an annotation of it."""
    return NASTY


@pytest.fixture
def sheet_storage(tmp_path: Path) -> Storage:
    """A run directory with exemplars and views only."""
    storage = Storage(tmp_path / "run")
    write_exemplars(storage)
    return storage


def write_scores_of_units(storage: Storage) -> None:
    """Simulation scores of milan's descriptions in the first layer, but unit 5's are of an earlier description."""
    judged = [
        ("judge", "milan", MODEL, LAYERS[0], u, system, "earlier" if u == 5 else said, "simulation", value, 1000)
        for u in range(UNITS - 1)
        for system, said, value in (
            ("own", describe(u), u / 100),
            ("shuffled", "other", -0.25),
            ("constant", "red thing", None),
        )
    ]
    write(storage, UNIT_SCORES, judged)
    write(
        storage,
        UNIT_SCORES,
        [("judge", "exemplars", MODEL, LAYERS[0], u, "own", "", "clarity", 0.5, 0) for u in range(UNITS)],
    )


def write_verdicts(storage: Storage) -> None:
    """Verdicts on milan's descriptions in the first layer: every fourth is supported; unit 5's is an earlier one."""
    kinds = ("supported", "partly", "unsupported", "nothing to describe")
    texts = ["earlier" if unit == 5 else describe(unit) for unit in range(UNITS - 1)]
    keys = {"labeler": "milan", "model": MODEL, "layer": LAYERS[0]}
    judge(storage, keys, texts, [kinds[unit % 4] for unit in range(UNITS - 1)])


def write_encodings(storage: Storage) -> None:
    """Features on a circle, unit after unit: neighbours are the numbers before and behind."""
    angles = 2 * np.pi * np.arange(UNITS) / UNITS
    features = [
        ("encoder", MODEL, LAYERS[0], u, r, [float(np.cos(angles[u])), float(np.sin(angles[u]))])
        for u in range(UNITS)
        for r in range(EXEMPLARS_EACH)
    ]
    write(storage, ENCODINGS, features)


def write_difference(storage: Storage) -> None:
    """The network beside itself: 25 units that say something else, unit 7 something hostile."""
    row = {"word": "zebra", "layer": "", "units": 4, "of": 9, "other_units": 1, "other_of": 8, "difference": -0.3}
    words = pl.DataFrame([row | {"low": -0.6, "high": 0.1, "p": 0.2, "q": 0.25}])
    changes = pl.DataFrame(
        [
            {
                "layer": LAYERS[0],
                "unit": u,
                "description": describe(u),
                "other_description": "striped dogs",
                "gained": ["dog", "stripe"],
                "lost": [describe(u).split()[0]],
            }
            for u in (7, *range(50, 74))
        ]
    )
    store(storage, Difference(words, changes, 90, (90, 90)), "milan", MODEL, MODEL)


@pytest.fixture(scope="session")
def full_storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run directory with everything the report shows; in the first layer, 89 has no description and 90 is dead."""
    storage = Storage(tmp_path_factory.mktemp("full") / "run")
    write_exemplars(storage)
    for layer in LAYERS:
        write(storage, LEVELS, [(MODEL, layer, u, 0.5 + u, 1000, 0, True) for u in range(UNITS)])
    first = LAYERS[0]
    write(
        storage,
        LEVELS,
        [
            (MODEL, first, u, 0.5 + u if u < UNITS else float("nan"), 1000, u // UNITS * 9, True)
            for u in range(UNITS + 1)
        ],
    )
    for labeler, shift in (("milan", 0.0), ("milan-pdE", 1.0)):
        described = [
            (
                labeler,
                MODEL,
                first,
                u,
                describe(u),
                score(u) + shift,
                -5.0,
                -20.0,
                0.2,
                [
                    {"text": text, "score": -1.0, "logp_d_given_e": -5.0, "logp_d": -20.0}
                    for text in (describe(u), "runner-up")
                ],
            )
            for u in range(UNITS - 1)
        ]
        write(storage, DESCRIPTIONS, described)
    write(storage, ANNOTATIONS, [("people", MODEL, first, 7, "A", NASTY), ("people", MODEL, first, 7, "B", "a sign")])
    files = [("/data", f"{NASTY}/{i}.jpg", 1, 2, None, NASTY if i else "cats", None) for i in range(6)]
    manifest = [(image_id, *file) for image_id, file in enumerate(files)]
    storage.write(MANIFEST, MANIFEST.table(rows(MANIFEST, manifest)), "a1b2", probe="p1")
    write_scores_of_units(storage)
    write_verdicts(storage)
    write_encodings(storage)
    write(storage, SKIPPED, [(MODEL, 6, "/data/<i>.jpg", "truncated file")])
    versions = '{"milan_ray":"0.1.0"}'
    write(storage, RUNS, [("exemplars", "a1b2", MODEL, "", 540, 6, 1.5, 4.0, "2025-01-01T00:00:00Z", versions)])
    scores = [
        (
            "held-out",
            system,
            metric,
            value,
            value - 0.1,
            value + 0.1,
            90,
            "without idf" if metric == "BERTScore" else "",
        )
        for system, value in (("milan", 0.5), ("constant", 0.25))
        for metric in ("BLEU", "BERTScore")
    ]
    write(storage, SCORES, scores)
    of_model = f"scores by judge: {MODEL}"
    write(storage, SCORES, [(of_model, "milan", "simulation", 0.4, 0.3, 0.5, 89, "higher is better")])
    write_difference(storage)
    return storage


@pytest.fixture(scope="session")
def site(full_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the full run directory."""
    folder = tmp_path_factory.mktemp("site with spaces") / "report"
    write_report(full_storage, folder, notes={"Mind": "a <toy> run"})
    return folder
