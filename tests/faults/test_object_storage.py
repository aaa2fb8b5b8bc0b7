"""The same job on `s3://` and `gs://`, against local servers: visibility, kill and resume, status, credentials."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gates import LIMIT, passes, wait_until
from PIL import Image
from pyarrow import fs

from milan_ray.engine.status import status
from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe import files
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.registry import resolve_probe
from milan_ray.schema import IMAGE_EMBEDDINGS
from milan_ray.storage import Storage

moto = pytest.importorskip("moto", reason="the local S3 server comes with the extra test")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "sEcReT/0123456789+ofNobody"
KEY = "AKIANOBODYATALL00000"
BUCKET = "photos-and-results"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def serving(log: Path, *command: str, port: int) -> Iterator[None]:
    """A server in a process of its own: in this one it could wait for the very stream that waits for it."""
    with log.open("w") as said:
        server = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said)
        try:
            wait_until(lambda: answers(port), f"a server listens; {log} says why not", server)
            yield
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def moto_log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moto") / "log"


@pytest.fixture(scope="module")
def s3_log(moto_log) -> Callable[[], str]:
    """What the server of :func:`s3` has answered."""
    return moto_log.read_text


@pytest.fixture(scope="module")
def s3(moto_log) -> Iterator[str]:
    """URI of an empty bucket; the environment of this process and its children can use it."""
    port = free_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = ("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    with serving(moto_log, *command, port=port), pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        endpoint = f"s3://{BUCKET}?scheme=http&endpoint_override=127.0.0.1:{port}&allow_bucket_creation=true"
        system, _ = fs.FileSystem.from_uri(endpoint)
        system.create_dir(BUCKET)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def gs(tmp_path_factory) -> Iterator[Callable[[str], str]]:
    """``gs(folder)``: the URI of a folder of a bucket on a server of this machine."""
    pytest.importorskip("gcp_storage_emulator", reason="the local server comes with the extra test")
    port = free_port()
    command = (str(ROOT / "tests/faults/gcs.py"), str(port), BUCKET)
    options = f"?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=30"
    with serving(tmp_path_factory.mktemp("gcs") / "log", *command, port=port):
        yield lambda folder: f"gs://anonymous@{BUCKET}/{folder}{options}"


@pytest.fixture(scope="module")
def remote_job(s3, job) -> Iterator[Any]:
    """The job with its probe in the bucket too, and with a folder of its own for all that Ray logs."""
    photos = Storage(f"{s3}/photos")
    for file in sorted(job.photos.rglob("*.png")):
        photos.put(str(file.relative_to(job.photos)), file.read_bytes())
    logs = Path(tempfile.mkdtemp(prefix="ray"))  # sockets' paths must be short
    yield replace(job, environment={"RAY_TMPDIR": str(logs)})
    shutil.rmtree(logs, ignore_errors=True)


@pytest.mark.slow
def test_job_on_s3_killed_and_started_again_ends_with_the_tables_of_a_local_one(s3, remote_job, undisturbed, tmp_path):
    """On an actor until it is killed, whose logs show no secret either, then on threads."""
    storage, where = Storage(f"{s3}/run"), tmp_path / "where"
    probe = ("--probe", f"{s3}/photos")
    never = {"MILAN_TEST_WHERE": str(where), "MILAN_TEST_PASSES": "5", "MILAN_TEST_GATE": str(tmp_path / "never")}
    environment = {**remote_job.environment, **never}
    process = replace(remote_job, environment=environment, actors=1).start(storage.root, *probe)
    wait_until(lambda: passes(where) > 5, "the sixth shard has begun", process)
    done = [file for file in storage.files("_work") if file.endswith(".parts")]
    said = remote_job.kill(process)
    assert len(done) == 5, said
    assert storage.files("exemplars") == []
    (unfinished,) = status(storage).work
    assert unfinished.files >= len(done)
    again = remote_job.run(storage.root, *probe)
    assert "5 of 23 shards are done already" in again
    found = remote_job.tables(storage)
    # The probe lies elsewhere, so its digest is another; all else is the same, to the bit.
    assert sorted(name.split()[0] for name in found) == sorted(name.split()[0] for name in undisturbed)
    for name, table in undisturbed.items():
        if not name.startswith("views"):
            assert found[name].equals(table), name
    (views,) = (table for name, table in found.items() if name.startswith("views"))
    (expected,) = (table for name, table in undisturbed.items() if name.startswith("views"))
    assert views.select(["image_id", "image"]).equals(expected.select(["image_id", "image"]))
    shown = status(storage)
    assert not shown.work and not [part for part in shown.partitions if part.state]
    before = storage.stat("exemplars")
    third = remote_job.run(storage.root, *probe)
    assert "all 2 layers are up to date" in third and "candidates" in third
    assert storage.stat("exemplars") == before
    shows_no_secret(said + again + third, storage, Path(remote_job.environment["RAY_TMPDIR"]))


def shows_no_secret(said: str, storage: Storage, logs: Path) -> None:
    """Neither the output nor any object nor any of Ray's logs holds the credentials."""
    assert SECRET not in said and KEY not in said
    for path in storage.files(""):
        data = storage.get(path)
        assert SECRET.encode() not in data and KEY.encode() not in data, path
    files = [file for file in logs.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix in (".log", ".out", ".err")]) > 5
    for file in files:
        data = file.read_bytes()
        assert SECRET.encode() not in data and KEY.encode() not in data, file


@pytest.mark.slow
def test_job_on_gs_killed_and_started_again_ends_with_the_tables_of_a_local_one(gs, job, undisturbed, tmp_path):
    photos, storage, where = Storage(gs("photos")), Storage(gs("run")), tmp_path / "where"
    for file in sorted(job.photos.rglob("*.png")):
        photos.put(str(file.relative_to(job.photos)), file.read_bytes())
    job = replace(job, verb="exemplars")
    never = {"MILAN_TEST_WHERE": str(where), "MILAN_TEST_PASSES": "5", "MILAN_TEST_GATE": str(tmp_path / "never")}
    process = replace(job, environment=never, actors=1).start(storage.root, "--probe", photos.root)
    wait_until(lambda: passes(where) > 5, "the sixth shard has begun", process)
    done = [file for file in storage.files("_work") if file.endswith(".parts")]
    said = job.kill(process)
    assert len(done) == 5 and storage.files("exemplars") == [], said
    assert "5 of 23 shards are done already" in job.run(storage.root, "--probe", photos.root)
    found = job.tables(storage)
    assert sorted({name.split()[0] for name in found}) == ["exemplars", "levels", "skipped", "views"]
    for name, table in found.items():
        if not name.startswith("views"):  # whose probe has another digest
            assert undisturbed[name].equals(table), name
    shown = status(storage)
    assert not shown.work and not [part for part in shown.partitions if part.state]


@pytest.mark.parametrize("store", ["s3", "gs"])
def test_put_is_seen_whole_or_not_at_all(store, request):
    storage = Storage(
        f"{request.getfixturevalue('s3')}/whole" if store == "s3" else request.getfixturevalue("gs")("whole")
    )
    versions = [bytes([value]) * size for value, size in ((1, 12_000_000), (2, 100), (3, 7_000_000))]
    storage.put("file", versions[0])
    seen: set[bytes] = set()
    over, looked = threading.Event(), threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(storage.get("file"))
            looked.set()

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions * 2:
        storage.put("file", version)
        looked.clear()
        assert looked.wait(LIMIT)
    over.set()
    reader.join()
    assert seen <= set(versions)


def test_put_on_s3_killed_in_the_middle_leaves_nothing(s3, s3_log):
    """Before, between and after the parts in which the file is sent."""
    script = """
import sys
from milan_ray.schema import IMAGE_EMBEDDINGS
from milan_ray.storage import Storage
storage = Storage(sys.argv[1])
data = bytes(60_000_000)
print("now", flush=True)
storage.put("torso", data)
print("done", flush=True)
"""
    storage = Storage(f"{s3}/killed")

    def sent(parts: int) -> bool:
        return s3_log().count("partNumber") >= parts

    for parts in (0, 1, 3):
        before = s3_log().count("partNumber")
        command = [sys.executable, "-c", script, storage.root]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        wait_until(partial(sent, before + parts), f"{parts} parts were sent")
        process.kill()
        done = "done" in process.communicate()[0]
        found = storage.files("")
        assert found == (["torso"] if done else []) or len(storage.get("torso")) == 60_000_000
        storage.remove("")


def test_storage_on_s3_says_in_one_sentence_what_is_wrong(s3, monkeypatch):
    with pytest.raises(MilanError, match=r"cannot write s3://no-such-bucket/run/.*there is no such bucket"):
        Storage("s3://no-such-bucket/run").check_writable()
    for root in ("s3://", "s3:///run", "gs://"):
        with pytest.raises(MilanError, match="names no bucket"):
            Storage(root)
    assert status(Storage(f"{s3}/nothing/here")).partitions == []


@pytest.mark.parametrize("where", [Storage, lambda root: FolderProbe([root]).manifest()], ids=["storage", "probe"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(where):
    with pytest.raises(MilanError, match="carries credentials") as caught:
        where(f"s3://{KEY}:{SECRET.replace('/', '%2F')}@{BUCKET}/run")
    assert KEY not in str(caught.value) and "sEcReT" not in str(caught.value)


def test_storage_options_in_the_uri_stay_behind_the_path(s3):
    port = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    storage = Storage(f"{s3}/options/?scheme=http&endpoint_override=127.0.0.1:{port}")
    storage.put("a/b", b"x")
    assert storage.files("a") == ["a/b"]
    assert storage.uri("a/b").startswith(f"{s3}/options/a/b?scheme=http&")
    assert Storage(storage.uri("a")).get("b") == b"x"


def test_probe_on_s3_reads_again_what_fails_for_a_moment(s3, monkeypatch):
    root = f"{s3}/flaky"
    Storage(root).put("image.png", b"x")
    system, base = files.filesystem(root)
    failures = [OSError("AWS Error SLOW_DOWN"), OSError("curlCode: 28, Timeout was reached")]

    class Flaky:
        def open_input_file(self, path: str) -> Any:
            if failures:
                raise failures.pop()
            return system.open_input_file(path)

    monkeypatch.setattr(files, "_PAUSES", (0.01, 0.01))
    with monkeypatch.context() as patch:
        patch.setattr(files, "filesystem", lambda root: (Flaky(), base))
        assert files.read_file(root, "image.png") == b"x"
    assert not failures
    monkeypatch.setattr(files, "_PAUSES", ())
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        files.read_file(root, "absent.png")
    nowhere = f"{root}?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(MilanError, match=r"cannot read .*see that the bucket is there"):
        files.read_file(nowhere, "image.png")


def test_probe_on_s3_reads_shards_as_from_disk(s3, tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(png, "PNG")
    pq.write_table(pa.table({"img": [png.getvalue()] * 2}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        info = tarfile.TarInfo("x.png")
        info.size = len(png.getvalue())
        archive.addfile(info, io.BytesIO(png.getvalue()))
    for name, count in (("a.parquet", 2), ("b.tar", 1)):
        Storage(f"{s3}/shards/{name[0]}").put(f"deep/{name}", (tmp_path / name).read_bytes())
        for root in (f"{s3}/shards/{name[0]}", f"{s3}/shards/{name[0]}/deep/{name}"):
            probe = resolve_probe([root])
            assert not isinstance(probe, LatentProbe)
            refs = image_refs(probe.manifest())
            assert len(refs) == count and all(probe.read(ref).image.getpixel((1, 1)) == (9, 8, 7) for ref in refs)
    Storage(f"{s3}/odd").put("a.jfif", png.getvalue())
    Storage(f"{s3}/odd").put("b", png.getvalue())
    Storage(f"{s3}/odd").put("c.txt", b"no image")
    assert FolderProbe([f"{s3}/odd"]).manifest()["path"].to_pylist() == ["a.jfif", "b"]


def test_storage_on_gs_asks_nothing_before_it_is_used():
    storage = Storage("gs://anonymous@bucket/run?retry_limit_seconds=1")
    assert isinstance(storage._fs, fs.GcsFileSystem)
    assert storage._base == "bucket/run" and not storage.is_local


def test_readers_of_an_object_see_one_version_however_it_is_replaced(s3):
    storage = Storage(f"{s3}/versions")
    at = {"encoder": "e", "probe": "p"}

    def write(value: float) -> None:
        pieces = [
            IMAGE_EMBEDDINGS.table(
                {"encoder": ["e"] * 2, "probe": ["p"] * 2, "image_id": [n, n + 1], "embedding": [[value] * 3] * 2}
            )
            for n in (0, 2, 4)
        ]
        storage.write_stream(IMAGE_EMBEDDINGS, pieces, str(value), {}, **at)

    write(1.0)
    pieces = storage.stream(IMAGE_EMBEDDINGS, ["image_id", "embedding"], **at)
    found = [next(pieces)]
    write(2.0)  # between the first row group and the second
    found += pieces
    assert [value.as_py() for piece in found for value in piece["embedding"]] == [[1.0] * 3] * 6
    path = storage.path(IMAGE_EMBEDDINGS, **at)
    whole = storage.get(path)
    with storage.open(path) as file:
        write(3.0)
        assert file.read(100) + file.read() == whole
    assert storage.get(path) != whole


def test_object_replaced_while_it_is_opened_is_read_again(s3, monkeypatch):
    storage = Storage(f"{s3}/opened")
    old, new = b"a" * 3_000_000, b"b" * 2_000_000
    storage.put("file", old)
    copy, copies = storage._copy, []

    def replaced_meanwhile(target, spool):
        copy(target, spool)
        copies.append(target)
        if len(copies) == 1:
            storage.put("file", new)

    monkeypatch.setattr(storage, "_copy", replaced_meanwhile)
    with storage.open("file") as file:
        assert file.read() == new
    assert len(copies) == 2
    with pytest.raises(FileNotFoundError):
        storage.open("absent")
