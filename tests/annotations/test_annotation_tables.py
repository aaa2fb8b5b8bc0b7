"""Published sets into the run directory and out again, and what runs on them."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from milan_ray.annotations.layout import write_annotations
from milan_ray.annotations.published import PublishedSet
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.report import write_report
from milan_ray.schema import ANNOTATIONS, EXEMPLARS, LEVELS, MANIFEST, VIEWS
from milan_ray.stages.annotations_export import run_export
from milan_ray.stages.annotations_import import import_csv, run_import
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import read_pngs


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_round_trip_of_any_set_is_byte_identical(write_layer, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    names = data.draw(
        st.lists(st.sampled_from(["0", "4", "10", "conv1", "blocks.0.mlp", "ä b"]), min_size=1, unique=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        root, rows = Path(folder, "net/photos"), []
        for name in names:
            count, k, size = (data.draw(st.integers(1, high)) for high in (4, 3, 9))
            units = rng.choice(50, count, replace=False) if data.draw(st.booleans(), "units") else None
            ids = rng.integers(0, 6, (count, k)) if data.draw(st.booleans(), "ids") else None
            images = rng.integers(0, 2, (count, k, 3, size, size), dtype=np.uint8) * 255  # equal ones do occur
            optional = {} if data.draw(st.booleans(), "activations") else {"activations": None}
            write_layer(root / name, rng, count, k, size, images=images, units=units, ids=ids, **optional)
            known = range(count) if units is None else units.tolist()
            rows += [(name, unit, f'{unit}, "said" ') for unit in known for _ in range(rng.integers(3))]
        if rows:
            write_annotations(root / "annotations.csv", [rows[i] for i in rng.permutation(len(rows))])
        storage = Storage(Path(folder, "run"))
        model = run_import(storage, PublishedSet(root))
        run_export(storage, model, Path(folder, "out"))
        assert contents(root) == contents(Path(folder, "out"))


def test_import_writes_the_tables_of_the_set(write_set, tmp_path):
    published, storage = PublishedSet(write_set()), Storage(tmp_path / "run")
    assert run_import(storage, published) == "net/photos"
    keys = {"model": "net/photos", "layer": "10"}
    table = storage.read(EXEMPLARS, **keys)
    assert table["unit"].to_pylist() == [5, 5, 9, 9]
    found = masks.unpack(table["mask"].to_pylist(), (8, 8))
    np.testing.assert_array_equal(found, published.files["10"].masks[:, :, 0].reshape(4, 8, 8))
    activations, meta = published.files["10"].activations, storage.metadata(EXEMPLARS, **keys)
    assert activations is not None and meta is not None
    np.testing.assert_array_equal(table["activation"].to_numpy(), activations.ravel())
    manifest = storage.read(MANIFEST, probe=meta["probe"])
    assert [manifest["path"][i].as_py() for i in table["image_id"].to_pylist()] == ["90", "91", "92", "93"]
    annotations = storage.read(ANNOTATIONS, source="milannotations", **keys)
    assert annotations.select(["unit", "annotator", "text"]).to_pylist() == [
        {"unit": 9, "annotator": "000", "text": "a dog"},
        {"unit": 9, "annotator": "001", "text": ""},
        {"unit": 9, "annotator": "002", "text": "dogs"},
    ]
    assert not storage.partitions(LEVELS)
    assert storage.work_names("") == []


def test_import_stores_an_image_once_by_id_and_content(write_layer, tmp_path):
    rng = np.random.default_rng(0)
    images = np.zeros((2, 2, 3, 4, 4), np.uint8)
    images[1, 1] = 1
    for layer, ids in (("a", np.array([[7, 8], [7, 8]])), ("b", None)):
        write_layer(tmp_path / "net/p" / layer, rng, 2, 2, 4, images=images, ids=ids)
    storage = Storage(tmp_path / "run")
    run_import(storage, PublishedSet(tmp_path / "net/p"))
    (probe,) = storage.partitions(MANIFEST)
    paths = sorted(storage.read(MANIFEST, **probe)["path"].to_pylist())
    assert paths[:3] == ["7", "8", "8"]
    assert all(path.startswith("sha256/") for path in paths[3:])
    assert sum(len(storage.read(VIEWS, **keys)) for keys in storage.partitions(VIEWS)) == len(paths) == 5


def mtimes(storage: Storage, table: str) -> dict[str, int]:
    return {name: os.stat(f"{storage.root}/{name}").st_mtime_ns for name in storage.files(table)}


def test_import_again_writes_nothing_and_new_annotations_alone(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    run_import(storage, PublishedSet(root))
    before = {table: mtimes(storage, table) for table in ("exemplars", "views", "annotations")}
    run_import(storage, PublishedSet(root))
    assert before == {table: mtimes(storage, table) for table in before}
    write_annotations(
        root / "annotations.csv", [("0", 0, "sky"), ("0", 2, "other"), ("9", 0, "lost"), ("0", 8, "lost")]
    )
    run_import(storage, PublishedSet(root))
    assert {table: mtimes(storage, table) for table in ("exemplars", "views")} == {
        table: before[table] for table in ("exemplars", "views")
    }
    assert storage.read(ANNOTATIONS, source="milannotations", model="net/photos", layer="0")["text"].to_pylist() == [
        "sky", "other"
    ]  # fmt: skip


def test_import_changed_files_replace_what_was_there(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    run_import(storage, PublishedSet(root))
    old = storage.config_of(EXEMPLARS, model="net/photos", layer="10")
    np.save(root / "0/images.npy", np.zeros((3, 2, 3, 8, 8), np.uint8))
    run_import(storage, PublishedSet(root))
    assert storage.config_of(EXEMPLARS, model="net/photos", layer="10") != old
    run_export(storage, "net/photos", tmp_path / "out")
    assert contents(root) == contents(tmp_path / "out")


def test_import_killed_half_way_goes_on(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    bad = np.load(root / "10/masks.npy")
    good = bad.copy()
    bad[0, 0, 0, 0, 0] = 2
    np.save(root / "10/masks.npy", bad)
    os.utime(root / "10/masks.npy", (1, 1))
    with pytest.raises(MilanError, match="values other than 0 and 1 at position 0"):
        run_import(storage, PublishedSet(root))
    before = {table: mtimes(storage, table) for table in ("exemplars", "views")}
    assert [keys["layer"] for keys in storage.partitions(EXEMPLARS)] == ["0"]
    np.save(root / "10/masks.npy", good)
    os.utime(root / "10/masks.npy", (1, 1))  # the same configuration, as after a kill
    run_import(storage, PublishedSet(root))
    assert before["views"] == mtimes(storage, "views")
    assert before["exemplars"].items() <= mtimes(storage, "exemplars").items()
    run_export(storage, "net/photos", tmp_path / "out")
    assert contents(root) == contents(tmp_path / "out")


def test_import_keeps_exemplars_that_were_made_here(write_set, tmp_path):
    published, storage = PublishedSet(write_set()), Storage(tmp_path / "run")
    run_import(storage, published)
    keys = {"model": "net/photos", "layer": "0"}
    table = storage.read(EXEMPLARS, **keys)
    storage.write(EXEMPLARS, table.replace_schema_metadata({"k": "2"}), "made here", **keys)
    with pytest.raises(MilanError, match="were made here"):
        run_import(storage, published)
    run_import(storage, published, model="theirs")
    assert {keys["model"] for keys in storage.partitions(EXEMPLARS)} == {"net/photos", "theirs"}


def test_import_csv_annotates_exemplars_that_are_there(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    run_import(storage, PublishedSet(root, annotated=False))
    write_annotations(tmp_path / "mine.csv", [("10", 9, "x"), ("10", 5, "y"), ("10", 9, "z"), ("7", 1, "lost")])
    written = import_csv(storage, tmp_path / "mine.csv", "net/photos", source="me", annotation_count=2, layers=["10"])
    assert written == 2
    assert storage.partitions(ANNOTATIONS) == [{"source": "me", "model": "net/photos", "layer": "10"}]
    assert storage.read(ANNOTATIONS, source="me", model="net/photos", layer="10")["text"].to_pylist() == ["x", "z"]
    with pytest.raises(MilanError, match="unknown model with exemplars 'net/photo'; nearest: net/photos"):
        import_csv(storage, tmp_path / "mine.csv", "net/photo", source="me")


GOOD = "layer,unit,summary\n10,9,a dog\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"{GOOD}conv1,0,sky\n", r"line 3: unknown layer with exemplars 'conv1'.*Dissect it first.*choose among 0, 10"),
        (f'{GOOD}10,5,"one\ntwo"\n1O,9,sky\n', r"line 5: unknown layer with exemplars '1O'; nearest: 10"),
        (f"{GOOD}0,12,sky\n", r"line 3: layer '0' of net/photos has no unit 12, the last one is 7.*correct the number"),
        (f"{GOOD}0,7,sky\n", r"line 3: unit 7 of layer '0' of net/photos has no exemplars; remove its rows"),
        (
            f"{GOOD}10,5, \u200b\n",
            r"line 3: says nothing of unit 5 of layer '10' .* write a summary, or remove the row",
        ),
        (f"{GOOD}0,1,\n", r"line 3: says nothing of unit 1"),
        (f"{GOOD}0,1,dogs, cats\n", r"line 3: has more cells than the header \(' cats' is beyond it\).*double quotes"),
        (f"{GOOD}0,1.0,dogs\n", r"line 3: needs a layer, a whole number as unit"),
        (f"{GOOD}0,1\n", r"line 3: needs a layer, a whole number as unit and a summary, got '0', '1', None"),
        ("layer,unit,summary,summary\n", r"line 1: has column summary twice; rename or remove one"),
        ("layer,unit,text\n0,0,x\n", r"has no column summary: it must have layer, unit, summary"),
        ("layer,unit,summary\n", r"has no annotations: add a row for each"),
        (f"{GOOD}0,1,caf\xe9\n".encode("cp1252"), r"cannot be read: line 3 holds byte 0xe9, .* not UTF-8; save it as"),
        (GOOD.encode("utf-16-le"), r"cannot be read: line 1 holds NUL.* save it as UTF-8"),
    ],
)
def test_import_csv_names_the_row_and_what_to_do(content, sentence, write_set, tmp_path):
    storage, file, keys = Storage(tmp_path / "run"), tmp_path / "mine.csv", {"model": "net/photos", "layer": "0"}
    run_import(storage, PublishedSet(write_set(), annotated=False))
    levels = {"unit": [0, 1, 2, 7], "level": [0.0] * 4, "positions": [1] * 4, "nonfinite": [0] * 4, "exact": [True] * 4}
    storage.write(LEVELS, LEVELS.table(levels, **keys), "levels", **keys)  # unit 7 is one that nothing excites
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MilanError, match=sentence) as found:
        import_csv(storage, file, "net/photos", source="me")
    assert str(file) in str(found.value)
    assert not storage.partitions(ANNOTATIONS)


def test_import_csv_reads_what_spreadsheets_write(write_set, tmp_path):
    storage, file = Storage(tmp_path / "run"), tmp_path / "mine.csv"
    run_import(storage, PublishedSet(write_set(), annotated=False))
    text = 'unit;summary;layer;note\r\n9;"dogs; cats";10;;\r\n9;café;10;x\r\n'
    for data in (text.encode("utf-8-sig"), text.encode("utf-16"), text.encode()):
        file.write_bytes(data)
        assert import_csv(storage, file, "net/photos", source="me") == 2
        found = storage.read(ANNOTATIONS, source="me", model="net/photos", layer="10")
        assert found["text"].to_pylist() == ["dogs; cats", "café"]
        assert found["annotator"].to_pylist() == ["000", "001"]
    with pytest.raises(MilanError, match="no annotations of these layers"):
        import_csv(storage, file, "net/photos", source="me", layers=["0"])
    with pytest.raises(MilanError, match="no unit with 3 annotations"):
        import_csv(storage, file, "net/photos", source="me", annotation_count=3)


def test_export_leaves_out_units_with_fewer_exemplars(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    run_import(storage, PublishedSet(root))
    keys = {"model": "net/photos", "layer": "0"}
    table, config = storage.read(EXEMPLARS, **keys), storage.config_of(EXEMPLARS, **keys)
    storage.write(EXEMPLARS, table.take([0, 1, 2, 4, 5]), config, **keys)
    run_export(storage, "net/photos", tmp_path / "out", layers=["0"])
    found = PublishedSet(tmp_path / "out")
    assert found.units() == [("0", 0), ("0", 2)]
    np.testing.assert_array_equal(found.lookup("0", 2).images, PublishedSet(root).lookup("0", 2).images)


def test_export_refuses_what_it_cannot_do(write_set, tmp_path):
    root, storage = write_set(), Storage(tmp_path / "run")
    run_import(storage, PublishedSet(root))
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (("net/photos", tmp_path / "there"), "exists already"),
        (("net/photo", tmp_path / "out"), "unknown model with exemplars"),
    ):
        with pytest.raises(MilanError, match=message):
            run_export(storage, *arguments)
    for options, message in (({"layers": ["1"]}, "unknown layer"), ({"source": "me"}, "unknown source")):
        with pytest.raises(MilanError, match=message):
            run_export(storage, "net/photos", tmp_path / "out", **options)
    run_import(storage, PublishedSet(root), source="again")
    with pytest.raises(MilanError, match="annotations from again, milannotations: choose"):
        run_export(storage, "net/photos", tmp_path / "out")
    run_export(storage, "net/photos", tmp_path / "out", source="again")
    np.save(root / "0/masks.npy", np.ones((3, 2, 1, 8, 8), np.uint8))
    run_import(storage, PublishedSet(root))
    with pytest.raises(MilanError, match="speak of other exemplars"):
        run_export(storage, "net/photos", tmp_path / "new", source="again")
    assert not (tmp_path / "new").exists()


def test_imported_set_has_what_encodings_and_report_read(write_set, tmp_path):
    published, storage = PublishedSet(write_set(activations=None)), Storage(tmp_path / "run")
    run_import(storage, published)
    for layer, files in published.files.items():
        meta = storage.metadata(EXEMPLARS, model="net/photos", layer=layer)
        assert meta is not None
        assert (meta["mask_height"], meta["mask_width"]) == ("8", "8")
        ids = storage.read(EXEMPLARS, model="net/photos", layer=layer)["image_id"].to_pylist()
        pngs = read_pngs(storage, meta["probe"], meta["view"], ids)
        found = np.stack([np.asarray(Image.open(io.BytesIO(pngs[i]))).transpose(2, 0, 1) for i in ids])
        np.testing.assert_array_equal(found, np.asarray(files.images).reshape(found.shape))
    cards = [
        file.read_text() for file in write_report(storage, tmp_path / "report").parent.glob("layers/*/*/cards/*.js")
    ]
    assert sum("a dog" in of_layer for of_layer in cards) == 1
    assert any('"activations":[null,' in of_layer for of_layer in cards)  # which the set does not tell
