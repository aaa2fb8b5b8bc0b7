"""The same images from any source give the same exemplars, to the last bit; bands reach a model's ``inputs=``."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import milan_ray
from milan_ray import cli
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.forward import read_inputs
from milan_ray.models.establish import establish
from milan_ray.models.registry import ModelSpec, get_model, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.plugins import load_plugins
from milan_ray.probe.arrays import ArrayProbe
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.registry import register_probe
from milan_ray.schema import EXEMPLARS, LEVELS, SKIPPED, VIEWS
from milan_ray.stages.exemplars import Exemplars, exemplar_fingerprints
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=500)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """Jobs are done by threads of this process: one for one shard, two for several."""
    with connected(Resources()):
        yield


@pytest.fixture(scope="module")
def sources(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The photographs of a folder in all forms."""
    return shards_of(photos, tmp_path_factory.mktemp("sources"))


def shards_of(photos: Path, root: Path) -> dict[str, Path]:
    """A folder's pictures in its order: itself, Parquet shards, tar shards and a folder of ``save_to_disk``."""
    files = [photos / path for path in FolderProbe([photos]).manifest()["path"].to_pylist()]
    kinds = {name: root / name for name in ("parquet", "tar", "arrow")}
    for folder in kinds.values():
        folder.mkdir()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = []
    for shard, part in enumerate((files[:30], files[30:71], files[71:])):
        rows = pa.table({"img": pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in part], struct)})
        pq.write_table(rows, kinds["parquet"] / f"train-{shard:05d}-of-00003.parquet", row_group_size=7)
        with tarfile.open(kinds["tar"] / f"{shard:06d}.tar", "w") as archive:
            for file in part:
                for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", file.parent.name.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        names.append(f"data-{shard:05d}-of-00003.arrow")
        with pa.OSFile(str(kinds["arrow"] / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=11)
    state = {"_data_files": [{"filename": name} for name in names]}
    (kinds["arrow"] / "state.json").write_text(json.dumps(state))
    return {"folder": photos, **kinds}


def tables(storage: Storage) -> dict[str, pa.Table]:
    """Ids, activations, masks, levels and pixels, without what says which probe they are from."""
    found = {}
    for table in (EXEMPLARS, LEVELS):
        for keys in storage.partitions(table):
            found[f"{table.name} {keys}"] = storage.read(table, **keys)
    for keys in storage.partitions(VIEWS):
        table = storage.read(VIEWS, **keys)
        columns = [name for name in table.column_names if name != "probe"]
        found[f"views {keys['view']} {keys['block']}"] = table.select(columns)
    return found


def assert_same(found: dict[str, pa.Table], expected: dict[str, pa.Table], name: str) -> None:
    assert found.keys() == expected.keys(), name
    for key, table in expected.items():
        assert found[key].equals(table), (name, key)


def test_any_source_gives_the_same_tables_to_the_last_bit(sources, tmp_path):
    expected = None
    for name, path in sources.items():
        for shard_size in (500, 16):  # one worker, and two
            storage = Storage(tmp_path / f"{name} {shard_size}")
            config = ExemplarConfig(k=4, batch_size=16, shard_size=shard_size)
            Exemplars([CNN], ProbeRef((str(path),)), config).run(storage, Resources())
            expected = expected or tables(storage)
            assert_same(tables(storage), expected, f"{name} {shard_size}")


@pytest.mark.slow
def test_any_source_of_500_pictures_gives_the_same_tables_on_actors(tmp_path):
    """64×64, in four classes: of each source on a thread, and of all four joined on threads and on two actors."""
    rng, photos = np.random.default_rng(6), tmp_path / "photos"
    for number in range(500):
        file = photos / "abcd"[number // 125] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    sources = shards_of(photos, tmp_path)

    def dissected(name: str, paths: tuple[str, ...], actors: int | None) -> dict[str, pa.Table]:
        storage = Storage(tmp_path / f"run {name}")
        config = ExemplarConfig(k=8, batch_size=16, shard_size=100)
        Exemplars([CNN], ProbeRef(paths), config).run(storage, Resources(actors=actors))
        return tables(storage)

    alone = [dissected(name, (str(path),), None) for name, path in sources.items()]
    for name, found in zip(sources, alone, strict=True):
        assert_same(found, alone[0], name)
    joined = tuple(map(str, sources.values()))
    here, there = (dissected(f"joined {actors}", joined, actors) for actors in (None, 2))
    assert_same(there, here, "all on actors")
    for name in (name for name in here if name.startswith("exemplars")):
        best = pl.DataFrame(pl.from_arrow(alone[0][name])).filter(pl.col("rank") < 2)  # each is there four times now
        assert here[name]["image_id"].to_pylist() == [
            500 * source + image for image in best["image_id"] for source in range(4)
        ]


def test_any_source_gives_a_notebook_what_a_job_finds(sources, tmp_path):
    storage = Storage(tmp_path)
    Exemplars([CNN], ProbeRef((str(sources["folder"]),)), CONFIG).run(storage, Resources())
    job = pl.DataFrame(pl.from_arrow(storage.read(EXEMPLARS, model="tiny/cnn", layer="0"))).sort("unit", "rank")
    files = [Path(sources["folder"], path) for path in FolderProbe([sources["folder"]]).manifest()["path"].to_pylist()]
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(Image.open(file)) for file in files]
    for images in (str(sources["tar"]), [str(sources["parquet"])], FolderProbe([sources["arrow"]]), opened, arrays):
        found = milan_ray.dissect("tiny/cnn", images, ["0"], k=4, plugins=[PLUGIN])
        one = found._exemplars["0"]
        assert one.ids.ravel().tolist() == job["image_id"].to_list()
        assert one.activations.ravel().tolist() == job["activation"].to_list()
        packed = [one.masks[unit, rank] for unit, rank in job.select("unit", "rank").iter_rows()]
        assert (masks.unpack(packed, (24, 24)) == masks.unpack(job["mask"].to_list(), (24, 24))).all()
    with pytest.raises(MilanError, match="image_column= is for"):
        milan_ray.dissect("tiny/cnn", arrays, ["0"], plugins=[PLUGIN], image_column="img")


def two_columns(path: Path) -> Path:
    rng = np.random.default_rng(5)
    columns: dict[str, list[object]] = {"left": [], "right": []}
    for _ in range(8):
        for column in columns.values():
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
            column.append(buffer.getvalue())
    pq.write_table(pa.table({**columns, "kind": list("abababab")}), path)
    return path


def test_options_image_column_and_label_column_choose(tmp_path, capsys):
    file = two_columns(tmp_path / "two.parquet")
    command = ["exemplars", "--model", "tiny/cnn", "--layers", "0", "--plugin", PLUGIN, "--no-report", "--k", "2"]
    assert cli.main([*command, "--probe", str(file), "--storage", str(tmp_path / "none")]) != 0
    assert "--image-column" in capsys.readouterr().err
    values = {}
    for column in ("left", "right"):
        place = tmp_path / column
        chosen = ["--image-column", column, "--label-column", "kind"]
        assert cli.main([*command, "--probe", str(file), "--storage", str(place), *chosen]) == 0
        values[column] = Storage(place).read(EXEMPLARS, model="tiny/cnn", layer="0")["activation"].to_pylist()
        (manifest,) = (place / "manifest").rglob("data.parquet")
        assert pl.read_parquet(manifest, hive_partitioning=False)["class_label"].to_list() == list("abababab")
    assert values["left"] != values["right"]
    notebook = {}
    for column in values:
        found = milan_ray.dissect("tiny/cnn", str(file), ["0"], k=2, plugins=[PLUGIN], image_column=column)
        notebook[column] = found.exemplars["activation"].to_list()
    assert notebook == values


def test_unreadable_files_and_unused_bits_are_said_when_a_job_starts(tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 4096, (24, 24)).astype(np.uint16)
        Image.fromarray(values).save(root / f"{number}.tif")
    for name in ("a.txt", "b.txt", "c.mp4"):
        (root / name).write_text("no image")
    Exemplars([CNN], ProbeRef((str(root),)), CONFIG).run(Storage(tmp_path / "run"), Resources())
    told = capsys.readouterr().err
    assert told.count("left out 3 files that are no images") == 1 and ".txt 2, .mp4 1" in told
    (line,) = [line for line in told.splitlines() if "16-bit pixels use 12 bits at most" in line]
    assert "0.tif (and 5 more images like it)" in line
    milan_ray.dissect("tiny/cnn", str(root), ["0"], k=2, plugins=[PLUGIN])
    told = capsys.readouterr().err
    assert told.count("left out 3 files") == 1 and told.count("16-bit pixels use 12 bits") == 1


# Bands.


class Bands(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(count, count, 1, bias=False)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def floats(views: torch.Tensor) -> torch.Tensor:
    return views.permute(0, 3, 1, 2).float()


def banded(name: str, count: int, bands: int | None) -> ModelSpec:
    view = Preprocess(View(resize=(6, 6), crop=None))
    return register_model(name, lambda weights: Bands(count), ["conv"], view, inputs=floats, bands=bands)


PIXELS = np.random.default_rng(2).integers(0, 256, (5, 6, 6, 7), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_all_bands_of_arrays_reach_inputs(count: int, tmp_path: Path):
    pixels = PIXELS[..., :count]
    banded(f"a7/arrays{count}", count, count)
    expected = pixels.astype(np.float32).max(axis=(1, 2))
    found = milan_ray.dissect(f"a7/arrays{count}", pixels, k=5)
    assert found.exemplars["activation"].to_list() == np.sort(expected.T)[:, ::-1].ravel().tolist()
    shown = np.asarray(found.lookup("conv", 0).images)
    first = found._exemplars["conv"].ids[0, 0]
    people = pixels[first][..., :3] if count > 3 else np.repeat(pixels[first][..., :1], 3, axis=2)
    np.testing.assert_allclose(shown[0], people.transpose(2, 0, 1) / np.float32(255), atol=1e-6)
    register_probe(f"a7/probe{count}", lambda: ArrayProbe(pixels))
    storage = Storage(tmp_path)
    Exemplars([ModelRef(f"a7/arrays{count}")], ProbeRef((f"a7/probe{count}",)), CONFIG).run(storage, Resources())
    job = storage.read(EXEMPLARS, model=f"a7/arrays{count}", layer="conv")["activation"].to_pylist()
    assert job == np.sort(expected.T)[:, :0:-1].ravel().tolist()
    (view,) = storage.partitions(VIEWS)
    png = storage.read(VIEWS, **view)["image"][0].as_py()
    assert Image.open(io.BytesIO(png)).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "LA", "L"])
def test_all_bands_of_files_reach_inputs_unmixed(mode: str, tmp_path: Path):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = PIXELS[0, ..., :bands].squeeze()
    Image.fromarray(pixels, mode).resize((12, 12), Image.Resampling.NEAREST).save(tmp_path / "a.tif")
    spec = banded(f"a7/{mode}", bands, bands)
    probe = FolderProbe([tmp_path])
    found = read_inputs(probe, image_refs(probe.manifest()), spec).views
    resized = [Image.fromarray(np.repeat(np.repeat(band, 2, 0), 2, 1)).resize((6, 6), Image.Resampling.BILINEAR)
               for band in np.moveaxis(pixels.reshape(6, 6, bands), -1, 0)]  # fmt: skip
    np.testing.assert_array_equal(found[0], np.stack([np.asarray(band) for band in resized], axis=-1))


def test_other_pictures_are_skipped_and_lost_bands_stop(tmp_path: Path):
    root = tmp_path / "photos"
    root.mkdir()
    for number, mode in enumerate(("RGBA", "RGB", "L", "RGBA", "P")):
        picture = Image.fromarray(PIXELS[number, ..., :3])
        picture = picture.quantize(5) if mode == "P" else picture.convert("RGBA").convert(mode)
        picture.save(root / f"{number}.png")
    storage = Storage(tmp_path / "run")
    banded("a7/four", 4, 4)
    config = ExemplarConfig(k=4, batch_size=16, max_bad=0.7)
    request = ProbeRef((str(root),))
    Exemplars([ModelRef("a7/four")], request, config).run(storage, Resources())
    reasons = storage.read(SKIPPED, model="a7/four")["reason"].to_pylist()
    assert reasons == ["has 3 bands where a7/four takes 4", "has 1 bands where a7/four takes 4",
                       "has 3 bands where a7/four takes 4"]  # fmt: skip
    banded("a7/none", 3, None)
    with pytest.raises(
        MilanError, match=r"0\.png has 4 bands, of which a7/none would see RGB alone: .*bands=4.*bands=3"
    ):
        Exemplars([ModelRef("a7/none")], request, config).run(storage, Resources())
    banded("a7/three", 3, 3)
    Exemplars([ModelRef("a7/three")], request, config).run(storage, Resources())
    assert not len(storage.read(SKIPPED, model="a7/three"))
    for name in ("0.png", "3.png"):
        (root / name).unlink()
    Exemplars([ModelRef("a7/none")], request, config).run(storage, Resources())  # RGB, grey, palette: as ever


def test_arrays_of_other_bands_are_refused_where_they_would_be_lost():
    load_plugins([PLUGIN])
    for model in ("tiny/cnn", "a7/lost"):
        banded("a7/lost", 3, None)
        with pytest.raises(MilanError, match=rf"has 4 bands, of which {model} would see RGB alone: .*bands=4"):
            milan_ray.dissect(model, PIXELS[..., :4], ["0" if model == "tiny/cnn" else "conv"])


def test_bands_enter_the_hash_only_where_they_are_not_three():
    parts = []
    for bands in (None, 3, 4):
        spec = banded("a7/hash", bands or 3, bands)
        network = spec.load()
        layouts = establish(spec, network, ["conv"])
        fingerprint = exemplar_fingerprints(spec, network, "w", "v", "p", CONFIG, layouts)["conv"]
        parts.append(fingerprint)
    assert parts[0].hash == parts[1].hash != parts[2].hash
    assert "bands" in parts[2].inputs and "bands" not in parts[0].inputs


@pytest.mark.parametrize(
    ("bands", "options"), [(4, {}), (0, {"inputs": floats}), (2, {"inputs": floats, "images": floats})]
)
def test_bands_without_inputs_are_refused(bands: int, options: dict[str, Any]):
    with pytest.raises(MilanError, match=rf"a7/wrong is registered with bands={bands}: "):
        register_model("a7/wrong", lambda weights: Bands(4), ["conv"], bands=bands, **options)
    with pytest.raises(MilanError, match="unknown model 'a7/wrong'"):
        get_model("a7/wrong")
