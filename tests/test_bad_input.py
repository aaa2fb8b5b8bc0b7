"""What bad input gets (docs/bad-input.md), through the whole stage; and that every row of that page has a test."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.forward import read_views
from milan_ray.models.view import View
from milan_ray.probe.arrays import ParquetProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, SKIPPED
from milan_ray.stages.exemplars import DissectedModels, Exemplars
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = (str(ROOT / "tests/plugins/bad_models.py"), str(ROOT / "tests/plugins/tiny_models.py"))
CONFIG = ExemplarConfig(k=3, batch_size=4, shard_size=8, max_bad=0.5)
MODELS = ("bad/values", "bad/raises", "bad/tuple", "bad/shape", "tiny/cnn")

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 200, (20, 24, 3), dtype=np.uint8))
WHITE = Image.new("RGB", (16, 16), "white")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 70,000 × 70,000 pixels in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", 70_000, 70_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


UNREADABLE = {  # file → what the table of skipped images says
    "bomb.png": "more than 89,478,485 pixels",
    "broken link.png": "No such file",
    "empty.jpg": r"is empty \(0 bytes\)",
    "float.tiff": "floating-point pixels",
    "long.png": "more elongated than 64:1",
    "text.png": "is no image in a known format",
    "truncated.jpg": "cannot be decoded",
    "truncated.png": "cannot be decoded",
}

READABLE = (  # modes, animations, and names that have broken programs before
    "16 bit.png",
    "alpha.png",
    "animated.webp",
    "cmyk.jpg",
    "gray.png",
    "palette.png",
    "a..b/up..down.png",
    "a..b/%2e%2e%2fetc.png",
    'it\'s "quoted" & <b>.png',
    "line\nbreak.png",
    "ünï 日本 🐶.png",
    "white.png",
)


def write_probe(folder: Path) -> None:
    contents = {
        "bomb.png": bomb(),
        "empty.jpg": b"",
        "float.tiff": encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"),
        "long.png": encoded(RGB.resize((70, 1))),
        "text.png": b"<html>404 not found</html>",
        "truncated.jpg": encoded(RGB, "JPEG")[:-60],
        "truncated.png": encoded(RGB)[:-60],
        "16 bit.png": encoded(Image.fromarray(np.full((16, 16), 40_000, np.uint16))),
        "alpha.png": encoded(RGB.convert("RGBA")),
        "animated.webp": encoded(RGB, "WEBP", save_all=True, append_images=[WHITE.resize(RGB.size)], lossless=True),
        "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
        "gray.png": encoded(RGB.convert("L")),
        "palette.png": encoded(RGB.quantize(9)),
        "white.png": encoded(WHITE),
    }
    for name in READABLE:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.get(name, encoded(RGB)))
    for name in UNREADABLE:
        if name in contents:
            (folder / name).write_bytes(contents[name])
    (folder / "broken link.png").symlink_to(folder / "nowhere.png")


def run(storage: Storage, probe: Path, models: tuple[str, ...] = MODELS) -> DissectedModels:
    requests = [ModelRef(name, layers=("0",), plugins=PLUGINS) for name in models]
    return Exemplars(requests, ProbeRef((str(probe),)), CONFIG).run(storage, Resources())


@pytest.fixture(scope="module")
def storage(ray_session, tmp_path_factory) -> Storage:
    return Storage(tmp_path_factory.mktemp("bad") / "run ü")


@pytest.fixture(scope="module")
def dissection(storage: Storage, tmp_path_factory) -> DissectedModels:
    """Good and bad models over good and bad images, in one job."""
    probe = tmp_path_factory.mktemp("it's a <probe> ü ..")
    write_probe(probe)
    return run(storage, probe)


@pytest.fixture(scope="module")
def paths(storage: Storage, dissection: DissectedModels) -> list[str]:
    (keys,) = storage.partitions(MANIFEST)
    return storage.read(MANIFEST, **keys)["path"].to_pylist()


def test_bad_images_are_skipped_counted_and_listed_with_the_reason(storage, dissection, paths) -> None:
    assert sorted(paths) == sorted([*UNREADABLE, *READABLE])
    for model in dissection.models:
        rows = storage.read(SKIPPED, model=model).to_pylist()
        assert [paths[row["image_id"]] for row in rows] == sorted(UNREADABLE)
        for row in rows:
            name = paths[row["image_id"]]
            assert row["path"].endswith(f"/{name}") and re.search(UNREADABLE[name], row["reason"]), row


def test_bad_names_and_modes_are_read_like_any_other(storage, dissection, paths) -> None:
    (keys,) = storage.partitions(MANIFEST)
    digests = storage.read(MANIFEST, **keys)["sha256"].to_pylist()
    assert {path for path, digest in zip(paths, digests, strict=True) if digest} == set(READABLE)
    levels = storage.read(LEVELS, model="tiny/cnn", layer="0").to_pydict()
    assert levels["positions"] == [len(READABLE) * 12 * 12] * 6


def test_bad_model_that_raises_or_changes_shape_fails_alone(storage, dissection) -> None:
    assert set(dissection.models) == {"bad/values", "bad/tuple", "tiny/cnn"}
    assert dissection.failed["bad/raises"] == ("the model failed on a batch: RuntimeError: too bright for this model")
    assert dissection.failed["bad/shape"] == (
        "layer '0' of bad/shape puts out a tensor of shape (4, 3, 16, 8), where it had (3, 16, 16) per image and the "
        "images on axis 0 before: dissect a layer whose shape is fixed."
    )
    assert {keys["model"] for keys in storage.partitions(EXEMPLARS)} == set(dissection.models)


def test_bad_model_with_nested_outputs_shows_the_first_tensor(storage, dissection) -> None:
    units = storage.read(LEVELS, model="bad/tuple", layer="0")["unit"].to_pylist()
    assert units == [0, 1, 2]


def test_dead_and_nonfinite_units_have_their_defined_exemplars(storage, dissection, paths) -> None:
    keys = {"model": "bad/values", "layer": "0"}
    rows = storage.read(EXEMPLARS, **keys).to_pylist()
    of_unit = {unit: [row for row in rows if row["unit"] == unit] for unit in range(4)}
    levels = storage.read(LEVELS, **keys).to_pydict()
    everything = len(READABLE) * 16 * 16
    assert levels["positions"] == [everything, everything, 0, everything - 256]
    assert levels["nonfinite"] == [0, 0, everything, 256]
    assert paths[of_unit[0][0]["image_id"]] == "white.png" and of_unit[0][0]["activation"] == 1

    # Dead: the first readable images by id, and nothing is strictly above the level.
    first = [i for i, path in enumerate(paths) if path in READABLE][:3]
    assert [row["image_id"] for row in of_unit[1]] == first
    assert levels["level"][1] == 0 and not masks.unpack([row["mask"] for row in of_unit[1]], (16, 16)).any()

    assert of_unit[2] == [] and np.isnan(levels["level"][2])
    finite = [row["image_id"] for row in of_unit[3]]  # as unit 0's, without the white image
    assert finite[:2] == [row["image_id"] for row in of_unit[0][1:]] and len(finite) == 3


def test_one_image_gives_one_exemplar_per_unit(ray_session, tmp_path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.png").write_bytes(encoded(RGB))
    storage = Storage(tmp_path / "run")
    run(storage, tmp_path / "one", ("tiny/cnn",))
    rows = storage.read(EXEMPLARS, model="tiny/cnn", layer="0")
    assert rows["rank"].to_pylist() == [0] * 6 and set(rows["image_id"].to_pylist()) == {0}


def test_nothing_but_bad_images_is_one_sentence(ray_session, tmp_path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.png").write_bytes(b"")
    with pytest.raises(MilanError, match=r"1 of 1 probe images are unreadable, the first .*a\.png \(is empty"):
        run(Storage(tmp_path / "run"), tmp_path / "none", ("tiny/cnn",))


IMAGES = [encoded(RGB, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(IMAGES)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@pytest.mark.filterwarnings("ignore::Warning")  # Pillow's remarks about what was broken
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.binary(max_size=100), st.sampled_from(IMAGES), damaged()), min_size=1, max_size=6)
)
def test_random_bytes_as_images_are_each_a_view_or_a_reason(tmp_path_factory, contents: list[bytes | None]) -> None:
    path = tmp_path_factory.mktemp("bytes") / "images.parquet"
    pq.write_table(pa.table({"image": pa.array(contents, pa.binary())}), path)
    probe = ParquetProbe(path)
    refs = image_refs(probe.manifest())
    batch = read_views(probe, refs, View(resize=16, crop=16))
    reasons = {ref.image_id: reason for ref, reason in batch.unreadable}
    assert sorted([*batch.ids.tolist(), *reasons]) == list(range(len(contents)))
    assert batch.views.shape == (len(contents) - len(reasons), 16, 16, 3) and batch.views.dtype == np.uint8
    assert all(reason and "\n" not in reason for reason in reasons.values())
    sound = [i for i, content in enumerate(contents) if content in IMAGES]
    assert set(sound) <= set(batch.ids.tolist())


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs/bad-input.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| input")]
    assert len(rows) >= 30
    known = {
        (str(file.relative_to(ROOT / "tests")), name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.split(" | ")[-1])
        assert named, f"no test named in: {row}"
        assert set(named) <= known, f"no such test: {set(named) - known}"
