"""A small real storage whose files can be damaged one by one, and the ways to damage them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from toys import toy_captioner

from milan_ray import cli
from milan_ray.captioner.captioner import Captioner
from milan_ray.schema import ANNOTATIONS, TABLES
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
MODELS = ("tiny/cnn", "tiny/twin")


def emptied(data: bytes) -> bytes:
    return b""


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def other_pages(data: bytes) -> bytes:
    """A bit in the first page's values is another: only its checksum can tell."""
    place = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # where the footer begins
    torn = bytearray(data)
    for at in range(60, max(61, place - 8), 23):
        torn[at] ^= 0x10
    return bytes(torn)


def other_footer(data: bytes) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    torn = bytearray(data)
    for at in range(len(data) - 8 - length, len(data) - 8, 7):
        torn[at] ^= 0x5A
    return bytes(torn)


def greedy_footer(data: bytes) -> bytes:
    """Its footer would be 4 GiB long."""
    return data[:-8] + b"\xff\xff\xff\x7f" + data[-4:]


def _written(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def other_columns(data: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    return _written(pa.table({"a": [1, 2]}).replace_schema_metadata(table.schema.metadata))


def other_types(data: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    columns = {name: [str(n) for n in range(len(table))] for name in table.column_names}
    return _written(pa.table({n: pa.array(c, pa.string()) for n, c in columns.items()}, metadata=table.schema.metadata))


def nulls(data: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    schema = pa.schema([field.with_nullable(True) for field in table.schema], table.schema.metadata)
    return _written(pa.Table.from_arrays([pa.nulls(2, field.type) for field in schema], schema=schema))


def without_metadata(data: bytes) -> bytes:
    return _written(pq.read_table(io.BytesIO(data)).replace_schema_metadata())


def no_rows(data: bytes) -> bytes:
    return _written(pq.read_table(io.BytesIO(data)).slice(0, 0))


def text(data: bytes) -> bytes:
    return b"<html>404 not found</html>\n" * 20


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    kind.__name__: kind
    for kind in (
        emptied, cut, other_pages, other_footer, greedy_footer, other_columns, other_types, nulls, without_metadata,
        no_rows, text,
    )
}  # fmt: skip
FOLDER = "folder"
"""A folder in the file's place."""


def damage(file: Path, kind: str) -> None:
    """Damages a file in one of the ways of :data:`DAMAGE`, or puts a folder in its place."""
    data = file.read_bytes()
    if kind == FOLDER:
        file.unlink()
        (file / "within").mkdir(parents=True)
        (file / "within/other.txt").write_text("other")
    else:
        file.write_bytes(DAMAGE[kind](data))


def repair(file: Path, data: bytes) -> None:
    """Puts a file back."""
    if file.is_dir():
        shutil.rmtree(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def captioner() -> Captioner:
    return toy_captioner(length=4, beam_size=5, lam=0.5)


def commands(place: Path) -> dict[str, list[str]]:
    """Verbs on that storage."""
    storage = ["--storage", str(place / "run")]
    at = [*storage, "--plugin", PLUGIN]
    probe = ["--model", *MODELS, "--probe", str(place / "photos"), *at]
    made = ["--k", "3", "--batch-size", "16", "--no-report"]
    clip, out = ["--clip", str(place / "clip")], ["tiny/cnn", str(place / "out"), "--layers", "0"]
    return {
        "describe": ["describe", *probe, "--decoder", "toy", "--pooled", *made],
        "label": ["label", *probe, "--labeler", "clip-dissect", *clip, "--concepts", str(place / "words.txt"), *made],
        "score": ["score", *probe, *clip, "--held-out", "0.9", "--top", "0.2"],
        "compare": ["compare", *at, "--no-report", "--annotations", "people"],
        "diff": ["diff", *MODELS, *storage],
        "train": ["train", *at, "--annotations", "people", "--encoder", "tiny", "--name", "new", "--dry-run"],
        "tune": ["tune", *at, "--annotations", "people", "--decoder", "toy", "--dry-run"],
        "generalize": ["generalize", *at, "--annotations", "people", "--encoder", "tiny", "--dry-run"],
        "annotations export": ["annotations", "export", *out, "--source", "people", *storage],
        "annotations collect": ["annotations", "collect", *out, *storage],
        "annotations statistics": ["annotations", "statistics", "--source", "people", *storage],
        "analyze": ["analyze", *probe, "--words", "dog", "--no-report", "--trials", "1"],
        "audit": ["audit", "--pair", *MODELS, "--words", "red", *at, "--no-report"],
        "status": ["status", *storage],
        "search": ["search", "dog|red|dark|areas|house|grass", *storage],
        "report": ["report", *storage, "--report", str(place / "report")],
        "doctor": ["doctor", "--no-ray", *at],
    }


def build(place: Path, save_clip: Callable[..., str]) -> Storage:
    """Two networks on 24 photographs: described, labelled, scored, compared, trained on, audited."""
    rng = np.random.default_rng(0)
    for index in range(24):
        file = place / "photos" / f"class {index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((24, 24)).save(file)
    (place / "photos/class 1/torn.png").write_bytes(b"no image")
    (place / "words.txt").write_text("dogs\ngrass\nred house\n")
    save_clip(place / "clip")
    storage = Storage(place / "run")
    save_captioner(storage, "toy", captioner(), "Untrained.")
    run = commands(place)
    assert cli.main(run["describe"]) == 0
    for model in MODELS:
        keys = {"source": "people", "model": model, "layer": "0"}
        rows: dict[str, object] = {"unit": [*range(6), 0], "annotator": ["A"] * 6 + ["B"], "text": ["red dogs"] * 7}
        rows |= {name: [value] * 7 for name, value in keys.items()}
        storage.write(ANNOTATIONS, ANNOTATIONS.table(rows), "people", **keys)
    for verb in ("label", "score", "compare", "diff", "audit"):
        assert cli.main(run[verb]) == 0, verb
    return storage


def tables(storage: Storage) -> dict[str, Path]:
    """The first file of every table, the first network's where it has one: (table → file)."""
    found: dict[str, Path] = {}
    for table in TABLES:
        for keys in storage.partitions(table):
            found.setdefault(table.name, Path(storage.root, storage.path(table, **keys)))
    return found
