"""F2: damaged files in every table, under the verbs that read them.

Right is: the table made anew, and it is said; or left out, and it is said; or one sentence with file and remedy.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import DAMAGE, FOLDER, MODELS, build, commands, damage, repair, tables

import milan_ray
from milan_ray import cli
from milan_ray.captioner.checkpoints import CONFIG, WEIGHTS
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.library.run_directory import RunExemplars, open_exemplars
from milan_ray.report.layers import layer_folder
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, LEVELS, VIEWS
from milan_ray.schema import TABLES as ALL_TABLES
from milan_ray.showcase.paper.claims import Section
from milan_ray.showcase.paper.page import store_section, stored_section
from milan_ray.stages.captioners import load_captioner
from milan_ray.stages.training import stored_state
from milan_ray.stages.training_units import UnitFeatures, write_units
from milan_ray.storage import WORK, Storage, WorkRemovedError

KINDS = (*DAMAGE, FOLDER)
BEHIND_THE_FOOTER = ("other_pages", "nulls")
"""Kinds that only those see who read the values."""
NOT_TO_BE_SEEN = ("no_rows",)
"""A table without rows may be as it should be."""

TABLES = (
    "manifest", "exemplars", "levels", "pooled", "views", "skipped", "encodings", "image_embeddings", "text_embeddings",
    "candidates", "descriptions", "annotations", "runs", "scores", "unit_scores", "differences", "changes", "audits",
    "audited", "verdicts",
)  # fmt: skip
REPORTED = (
    "exemplars", "levels", "views", "skipped", "descriptions", "annotations", "runs", "scores", "unit_scores",
    "differences", "changes", "audits", "audited", "manifest", "verdicts",
)  # fmt: skip
"""What the report shows; encodings as well, where they are sound as far as they go."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_clip: Callable[..., str]) -> Iterator[Path]:
    """A folder with a storage of two networks, made by the verbs themselves."""
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILAN_MODELS_DIR", str(folder / "models"))
        storage = build(folder, save_clip)
        assert cli.main(commands(folder)["report"]) == 0
        assert set(tables(storage)) == set(TABLES)
        shutil.copytree(folder / "run", folder / "sound")
        yield folder


@pytest.fixture
def run(place: Path, capsys: Any) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """``run(verb)``: exit status, standard output, and all that was said; the storage is sound again afterwards."""

    def go(verb: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([*commands(place)[verb], *more])
        out, err = capsys.readouterr()
        assert "should not happen" not in out + err and "Traceback" not in out + err, (verb, err)
        return status, out, out + err

    yield go
    restore(place)


def restore(place: Path) -> None:
    for folder in ("run", "out", "report"):
        shutil.rmtree(place / folder, ignore_errors=True)
    shutil.copytree(place / "sound", place / "run")


def short(file: Path, place: Path) -> str:
    return str(file.relative_to(place))


def kinds_for(table: str, count: int, data: bytes) -> list[str]:
    """Some kinds of damage, so that all tables together meet all kinds; without rows there are no pages to damage."""
    found = islice(cycle(KINDS), TABLES.index(table) * count, (TABLES.index(table) + 1) * count)
    return [kind for kind in found if kind != "other_pages" or pq.read_metadata(io.BytesIO(data)).num_rows]


@pytest.mark.parametrize("table", TABLES)
def test_status_lists_what_is_damaged_and_goes_on(table: str, place: Path, run: Any) -> None:
    file = tables(Storage(place / "run"))[table]
    data = file.read_bytes()
    sound = run("status")[1].splitlines()
    for kind in kinds_for(table, 7, data):
        damage(file, kind)
        more = ("--verify",) if kind in BEHIND_THE_FOOTER else ()
        status, out, _ = run("status", *more)
        assert status == 0
        lines = [line for line in out.splitlines() if short(file, place) in line]
        if kind not in NOT_TO_BE_SEEN:
            assert len(lines) == 1 and "damaged: " in lines[0] and ("delete it" in lines[0] or "remove it" in lines[0])
            assert "1 damaged" in out
        others = [line for line in sound if line.startswith(("exemplars ", "levels ")) and MODELS[1] in line]
        assert others and all(any(line.startswith(other) for line in out.splitlines()) for other in others)
        repair(file, data)


@pytest.mark.parametrize("kind", KINDS)
def test_search_leaves_damaged_descriptions_out_and_says_so(kind: str, place: Path, run: Any) -> None:
    tables_of = tables(Storage(place / "run"))
    sound = run("search")[1].splitlines()
    for table in ("descriptions", "exemplars", "runs"):
        data = tables_of[table].read_bytes()
        damage(tables_of[table], kind)
        status, out, said = run("search")
        assert status == 0
        if table != "descriptions":
            assert out.splitlines() == sound
        elif kind not in NOT_TO_BE_SEEN:
            assert f"search: left out: {tables_of[table]}" in said and ("delete it" in said or "remove it" in said)
        assert [line.split()[1:] for line in out.splitlines() if MODELS[1] in line] == [
            line.split()[1:] for line in sound if MODELS[1] in line
        ] or table == "descriptions"
        assert sum(MODELS[1] in line for line in out.splitlines()) == sum(MODELS[1] in line for line in sound)
        repair(tables_of[table], data)


@pytest.mark.parametrize("table", TABLES)
def test_report_leaves_out_what_is_damaged_and_says_so(table: str, place: Path, run: Any) -> None:
    file = tables(Storage(place / "run"))[table]
    data = file.read_bytes()
    for kind in kinds_for(table, 4 if table in REPORTED else 1, data):
        shutil.rmtree(place / "report", ignore_errors=True)
        damage(file, kind)
        status, _, said = run("report")
        assert status == 0, said
        if table in REPORTED and kind not in NOT_TO_BE_SEEN:
            (line,) = [line for line in said.splitlines() if short(file, place) in line]
            assert line.startswith("report: left out: ") and ("delete it" in line or "remove it" in line)
        pages = [page.read_text(encoding="utf-8") for page in (place / "report").rglob("index.html")]
        assert any(MODELS[1] in page for page in pages) and len(pages) >= 4
        if table == "exemplars" and kind not in NOT_TO_BE_SEEN:  # no page leads to what is not there
            gone = layer_folder(MODELS[0], "0")
            model, _, layer = gone.rstrip("/").rpartition("/")
            assert gone not in (place / "report/index.html").read_text(encoding="utf-8")
            assert f"{layer}/" not in (place / "report" / model / "index.html").read_text(encoding="utf-8")
        repair(file, data)


NEEDS = {
    "describe": ("manifest", "exemplars", "levels", "pooled", "views", "encodings", "candidates", "descriptions"),
    "label": ("manifest", "exemplars", "pooled", "image_embeddings", "text_embeddings", "descriptions"),
    "score": ("descriptions", "pooled", "exemplars", "unit_scores", "scores", "image_embeddings"),
    "compare": ("descriptions", "annotations", "unit_scores", "runs", "scores"),
    "diff": ("descriptions", "exemplars", "differences", "changes"),
    "audit": ("descriptions", "exemplars", "manifest", "audits", "audited", "scores"),
    "train": ("annotations", "encodings", "exemplars"),
    "annotations export": ("exemplars", "annotations", "views", "manifest"),
    "annotations collect": ("exemplars", "views"),
}
"""Verb → tables that it reads or makes, so that it meets their damage."""


@pytest.mark.parametrize("verb", NEEDS)
def test_other_verbs_make_anew_or_say_which_file_and_what_to_do(verb: str, place: Path, run: Any) -> None:
    for number, table in enumerate(NEEDS[verb]):
        kind = KINDS[(5 * number + 2 * len(verb)) % len(KINDS)]
        restore(place)
        file = tables(Storage(place / "run"))[table]
        damage(file, kind)
        status, _, said = run(verb)
        if status:
            errors = [line for line in said.splitlines() if line.startswith(("error: ", "skipped ", "FAILED "))]
            assert errors, said
            if kind not in NOT_TO_BE_SEEN:
                assert any(short(file, place) in line for line in errors), (table, kind, errors)
                assert any("delete it" in line or "remove it" in line for line in errors), errors


@pytest.mark.parametrize("kind", ["emptied", "cut", "other_footer", "other_columns", "without_metadata"])
def test_what_can_be_made_anew_is_and_is_what_it_was(kind: str, place: Path, run: Any) -> None:
    """Of every table on the way to a description at once; and the reason stands in the dry run."""
    sound = Storage(place / "sound")
    made = ("manifest", "exemplars", "levels", "pooled", "skipped", "encodings", "candidates", "descriptions")
    files = {table: tables(Storage(place / "run"))[table] for table in made}
    for file in files.values():
        damage(file, kind)
    planned = run("describe", "--dry-run")[1]
    assert "exemplars" in planned and "damaged" in planned
    status, _, said = run("describe")
    assert status == 0 and "is damaged: it counts as missing, and is made anew" in said
    again = Storage(place / "run")
    for table in ALL_TABLES:
        if table.name in made and table.name != "descriptions":  # the first labeler's are another verb's
            for keys in sound.partitions(table):
                found, expected = again.read(table, **keys), sound.read(table, **keys)
                assert found.drop_columns(["mtime"] if "mtime" in found.column_names else []).equals(
                    expected.drop_columns(["mtime"] if "mtime" in expected.column_names else [])
                ), (table.name, keys)


def test_python_users_get_the_sentence_and_the_rest(place: Path, run: Any) -> None:
    storage = Storage(place / "run")
    keys = {"labeler": "milan", "model": MODELS[0], "layer": "0"}
    damage(Path(storage.root, storage.path(DESCRIPTIONS, **keys)), "other_pages")
    found = milan_ray.search(storage, "dog|red|dark|areas|house|grass")
    assert set(found["model"]) == set(MODELS)
    with pytest.raises(DamagedTable, match=r"descriptions.*is damaged.*delete it and run the job that makes"):
        milan_ray.diff(storage, *MODELS)
    exemplars = open_exemplars(storage.root, MODELS[0])
    assert isinstance(exemplars, RunExemplars)
    with pytest.raises(DamagedTable, match="is damaged"):
        exemplars.lookup("0", 0)
    assert exemplars.lookup("2", 0).image_ids.size == 3
    for table, layer in ((EXEMPLARS, "2"), (VIEWS, "")):
        restore(place)
        (at, *_) = [keys for keys in storage.partitions(table) if keys.get("layer", "") == layer]
        damage(Path(storage.root, storage.path(table, **at)), "cut")
        with pytest.raises(DamagedTable, match=f"{table.name}.*is damaged"):
            exemplars.lookup("2", 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_TO_BE_SEEN])
def test_every_reader_of_a_storage_says_the_same_of_a_damaged_table(kind: str, place: Path, run: Any) -> None:
    storage, keys = Storage(place / "run"), {"model": MODELS[0], "layer": "0"}
    path = storage.path(LEVELS, **keys)
    damage(Path(storage.root, path), kind)
    readers: list[Callable[[], object]] = [
        lambda: storage.read(LEVELS, **keys),
        lambda: storage.read(LEVELS, [column.name for column in LEVELS.columns[1:]], **keys),
        lambda: storage.read_rows(LEVELS, 0, 2, ["unit", "level"], **keys),
        lambda: list(storage.stream(LEVELS, **keys)),
    ]
    for read in readers:
        with pytest.raises(DamagedTable, match=r"(is damaged \(.*\); delete it|is a folder.*; remove it)") as error:
            read()
        assert storage.uri(path) in str(error.value) and "\n" not in str(error.value)
    if kind not in BEHIND_THE_FOOTER:
        with pytest.raises(DamagedTable):
            storage.metadata(LEVELS, **keys)
        assert not storage.is_current(LEVELS, "any", **keys)
    assert keys in storage.partitions(LEVELS)


def test_a_torn_piece_of_work_is_gone_and_so_made_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    piece = pa.table({"a": list(range(1000)), "b": [f"text {n}" for n in range(1000)]})
    for number, torn in enumerate((b"", None, b"no arrow" * 100)):
        storage.put_work("hash", f"shard/{number}", piece)
        file = tmp_path / f"{WORK}/hash/shard/{number}.arrow"
        file.write_bytes(file.read_bytes()[:-300] if torn is None else torn)
        with pytest.raises(WorkRemovedError, match="was damaged and is gone; run the job again"):
            storage.get_work("hash", f"shard/{number}")
        assert storage.work_names("hash") == []
    storage.put_work("hash", "shard/0", piece)
    assert storage.get_work("hash", "shard/0").equals(piece)


def test_units_of_a_killed_training_that_are_torn_are_written_anew(place: Path, run: Any) -> None:
    storage = Storage(place / "run")
    layers = [(model, "0") for model in MODELS]
    sound = write_units(storage, "work", "people", "tiny", layers)
    expected = sound.take(range(len(sound)))
    for name in ("texts.parquet", "000001.parquet"):
        (file,) = (place / "run" / WORK / "work").rglob(name)
        for kind in ("emptied", "cut", "other_footer", "text"):
            damage(file, kind)
            with pytest.raises(DamagedTable):
                UnitFeatures(storage, "work", check=True)
            again = write_units(storage, "work", "people", "tiny", layers)
            assert again.take(range(len(again))).equal(expected) and again.texts == sound.texts
    (file,) = (place / "run" / WORK / "work").rglob("000000.parquet")
    damage(file, "other_pages")
    with pytest.raises(DamagedTable, match="is damaged"):
        again = UnitFeatures(storage, "work")
        again.take(range(len(again)))


def test_a_damaged_state_of_training_begins_anew_and_says_so(tmp_path: Path, capsys: Any) -> None:
    storage = Storage(tmp_path)
    assert stored_state(storage, f"{WORK}/x/state.pt") is None
    for data in (b"", b"PK\x03\x04 torn", b"\x80\x04."):
        storage.put(f"{WORK}/x/state.pt", data)
        assert stored_state(storage, f"{WORK}/x/state.pt") is None
        assert "state.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"\xff\xfe\x00", b"\xff" * 8 + b"{}", None])
def test_damaged_captioners_name_their_folder(name: str, torn: bytes | None, place: Path, run: Any) -> None:
    file = place / "run/captioners/toy" / name
    data = file.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    file.write_bytes(flipped if torn is None and name == WEIGHTS else data[:-20] if torn is None else torn)
    with pytest.raises(MilanError, match=r"run/captioners/toy: .*(train it again|update milan_ray)"):
        load_captioner(Storage(place / "run"), "toy")
    assert run("describe")[0] == 1
    assert run("search")[0] == run("status")[0] == 0


def test_pages_of_the_paper_leave_damaged_experiments_out(tmp_path: Path, capsys: Any) -> None:
    storage = Storage(tmp_path)
    store_section(storage, Section("analysis", "Analysis"))
    assert stored_section(storage, "analysis") == Section("analysis", "Analysis")
    for data in (b"", b"{", b"[]", b'{"name": 1}', b"\xff\xfe"):
        storage.put("paper/analysis.json", data)
        assert stored_section(storage, "analysis") is None
        said = capsys.readouterr().err
        assert "paper/analysis.json is damaged" in said and "delete it" in said


def test_a_review_that_is_no_csv_is_one_sentence(place: Path, run: Any) -> None:
    file = place / "run/audited/audit=faces/review.csv"
    for data in (b"", b"\xff\xfe\x00", b"model,layer\n", b"\0\0\0"):
        file.write_bytes(data)
        status, _, said = run("audit")
        assert status == 1 and "review.csv" in said


def test_status_as_json_has_damage_as_a_state(place: Path, run: Any) -> None:
    damage(tables(Storage(place / "run"))["levels"], "cut")
    found = json.loads(run("status", "--json")[1])
    (partition,) = [partition for partition in found["partitions"] if partition["state"].startswith("damaged: ")]
    assert partition["table"] == "levels" and partition["keys"]["model"] == MODELS[0]


ALONE = [
    # verb, the damaged table, what is due of both models
    ("describe", "exemplars", ("encodings",)),
    ("describe", "encodings", ("candidates",)),
    ("describe", "candidates", ("descriptions",)),
    ("label", "pooled", ("descriptions",)),
    ("score", "descriptions", ("unit_scores",)),
    ("score", "pooled", ("unit_scores",)),
    ("score", "exemplars", ("unit_scores",)),
]


@pytest.mark.parametrize(("verb", "table", "due"), ALONE)
def test_a_model_with_a_damaged_table_fails_alone(verb: str, table: str, due: Any, place: Path, run: Any) -> None:
    """Damaged pages, which footers do not tell: the other models of the zoo are done, and nothing is left in _work."""
    storage = Storage(place / "run")
    for name in due:
        for keys in storage.partitions(next(each for each in ALL_TABLES if each.name == name)):
            if name != "descriptions" or keys["labeler"].startswith(("milan", "clip-dissect")):
                storage.remove_file(storage.path(next(each for each in ALL_TABLES if each.name == name), **keys))
    sound = Storage(place / "sound")
    (keys, *_) = [
        k for k in sound.partitions(next(n for n in ALL_TABLES if n.name == table)) if k["model"] == MODELS[0]
    ]
    file = Path(storage.root, storage.path(next(n for n in ALL_TABLES if n.name == table), **keys))
    damage(file, "other_pages")
    status, _, said = run(verb)
    assert status == 1
    lines = [line for line in said.splitlines() if line.startswith(f"skipped {MODELS[0]}: ")]
    assert len(lines) == 1, said
    (line,) = lines
    assert short(file, place) in line and "is damaged" in line and "delete it" in line
    assert ("the others go on" in said or f"FAILED {MODELS[0]}" in said) and f"skipped {MODELS[1]}" not in said
    for name in due:
        made = next(each for each in ALL_TABLES if each.name == name)
        again = [keys for keys in sound.partitions(made, model=MODELS[1]) if keys in storage.partitions(made)]
        assert again and all(storage.read(made, **k).equals(sound.read(made, **k)) for k in again), name
    assert not (place / "run" / WORK).exists()


def test_where_all_models_are_damaged_the_job_fails_and_names_the_files(place: Path, run: Any) -> None:
    files = [
        place / f"run/encodings/encoder=tiny/model={quote(model, safe='')}/layer=0/data.parquet" for model in MODELS
    ]
    shutil.rmtree(place / "run/candidates")
    for path in (place / "run/encodings").rglob("*.parquet"):
        damage(path, "other_pages")
    status, _, said = run("describe")
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(short(file, place) in line for file in files) and "delete it" in line
    assert not (place / "run" / WORK).exists()
