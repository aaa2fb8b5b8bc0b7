from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.base import Probe
from milan_ray.probe.folder import FolderProbe, read_labels
from milan_ray.probe.manifest import digest, image_refs


def draw(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (color, 0, 0)).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders with names whose order depends on how one sorts, nested folders, and files that are no images."""
    root = tmp_path / "probe"
    names = ["b/2.png", "b/10.PNG", "b/sub/1.jpg", "b/sub-x/3.jpg", "b-c/1.jpeg", "B/z.bmp", "a/é.webp", "a/x y.png"]
    for color, name in enumerate(names):
        draw(root / name, color)
    for name in ("b/notes.txt", "README"):
        (root / name).write_text("no image")
    return root


def paths(probe: Probe) -> list[str]:
    return probe.manifest()["path"].to_pylist()


def test_folder_classes_has_the_ids_and_labels_of_torchvision_s_imagefolder(classes: Path) -> None:
    expected = ImageFolder(str(classes))
    manifest = FolderProbe([classes]).manifest()
    assert [str(classes / path) for path in manifest["path"].to_pylist()] == [path for path, _ in expected.samples]
    assert manifest["class_label"].to_pylist() == [expected.classes[target] for _, target in expected.samples]
    assert manifest["image_id"].to_pylist() == list(range(8))


def test_folder_golden_images_have_imagefolder_s_order(golden: Path) -> None:
    expected = [path for path, _ in ImageFolder(str(golden / "images")).samples]
    assert [str(golden / "images" / path) for path in paths(FolderProbe([golden / "images"]))] == expected


def test_folder_manifest_records_size_and_time_but_reads_no_content(classes: Path) -> None:
    row = FolderProbe([classes]).manifest().slice(0, 1).to_pylist()[0]
    status = (classes / row["path"]).stat()
    assert (row["root"], row["size"], row["mtime_ns"]) == (str(classes), status.st_size, status.st_mtime_ns)
    assert row["sha256"] is None


def test_folder_flat_is_sorted_and_without_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "10.png", "9.png"):
        draw(tmp_path / name)
    manifest = FolderProbe([tmp_path]).manifest()
    assert manifest["path"].to_pylist() == ["10.png", "9.png", "a.png", "b.png"]
    assert manifest["class_label"].null_count == 4


def test_folder_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/._1.png", ".thumbs/2.png", "a/.cache/3.png"):
        draw(tmp_path / name)
    assert paths(FolderProbe([tmp_path])) == ["a/1.png"]


def test_folder_several_roots_are_joined_in_the_order_given(tmp_path: Path) -> None:
    draw(tmp_path / "z/cat/1.png")
    draw(tmp_path / "y/1.png")
    probe = FolderProbe([tmp_path / "z", tmp_path / "y"])
    manifest = probe.manifest()
    assert manifest["root"].to_pylist() == [str(tmp_path / "z"), str(tmp_path / "y")]
    assert manifest["class_label"].to_pylist() == ["cat", None]
    assert probe.name == "z+y"


def test_folder_read_gives_rgb_and_the_digest_of_the_bytes(classes: Path) -> None:
    probe = pickle.loads(pickle.dumps(FolderProbe([classes])))
    ref = image_refs(probe.manifest(), [3])[0]
    found = probe.read(ref)
    assert (found.image.mode, found.image.size) == ("RGB", (5, 4))
    assert found.sha256 == hashlib.sha256((classes / ref.path).read_bytes()).hexdigest()
    assert probe.concept_maps(ref) is None


def test_folder_uri_lists_and_reads_as_the_local_path_does(classes: Path) -> None:
    local, remote = FolderProbe([classes]), FolderProbe([classes.as_uri()])
    for column in ("path", "size", "mtime_ns", "class_label"):
        assert local.manifest()[column].to_pylist() == remote.manifest()[column].to_pylist()
    for here, there in zip(image_refs(local.manifest()), image_refs(remote.manifest()), strict=True):
        assert local.read(here).sha256 == remote.read(there).sha256


def test_folder_deleted_image_is_unreadable_with_the_reason(classes: Path) -> None:
    for root in (classes, classes.as_uri()):
        probe = FolderProbe([root])
        ref = image_refs(probe.manifest(), [0])[0]
        content = (classes / ref.path).read_bytes()
        (classes / ref.path).unlink()
        with pytest.raises(UnreadableImage, match="cannot be read"):
            probe.read(ref)
        (classes / ref.path).write_bytes(content)


def test_folder_broken_link_is_listed_and_unreadable(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    probe = FolderProbe([tmp_path])
    assert probe.manifest()["size"].null_count == 1
    with pytest.raises(UnreadableImage, match="No such file"):
        probe.read(image_refs(probe.manifest(), [1])[0])


def test_folder_links_to_folders_are_followed(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere")
    assert paths(FolderProbe([tmp_path / "root"])) == ["cat/1.png"]


@pytest.mark.parametrize("uri", [False, True])
def test_folder_missing_or_empty_is_one_clear_sentence(tmp_path: Path, uri: bool) -> None:
    for name, text in (("absent", "cannot list"), ("empty", "no images in")):
        if name == "empty":
            (tmp_path / name).mkdir()
        root = (tmp_path / name).as_uri() if uri else tmp_path / name
        with pytest.raises(MilanError, match=f"{text} .*{name}"):
            FolderProbe([root]).manifest()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "closed/1.png")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(MilanError, match=r"cannot list .*closed \(Permission denied\)"):
        FolderProbe([tmp_path]).manifest()
    (tmp_path / "closed").chmod(0o700)


def test_folder_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(MilanError, match="not valid UTF-8"):
        FolderProbe([tmp_path]).manifest()


def test_folder_unknown_scheme_is_named() -> None:
    with pytest.raises(MilanError, match="cannot open nothing://bucket"):
        FolderProbe(["nothing://bucket/x"]).manifest()


@pytest.mark.parametrize(
    "text",
    [
        "id,File,Label\n0,a.png,golden retriever\n1,sub/b.png,cat\n",
        "name,class\na.png,golden retriever\nb.png,cat\n",
        '\ufefflabel,path\n"golden retriever",a.png\ncat,sub/b.png\n',
        "a.png golden retriever\nsub/b.png\tcat\n",
    ],
)
def test_labels_csv_or_lines_replace_the_folders_names(tmp_path: Path, text: str) -> None:
    for name in ("a.png", "c.png", "sub/b.png"):
        draw(tmp_path / "images" / name)
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    manifest = FolderProbe([tmp_path / "images"], tmp_path / "labels.txt").manifest()
    found = dict(zip(manifest["path"].to_pylist(), manifest["class_label"].to_pylist(), strict=True))
    assert found == {"a.png": "golden retriever", "c.png": None, "sub/b.png": "cat"}


def test_labels_real_photographs_are_all_labelled(shared: Path) -> None:
    images = shared / "data/images/imagenet_sample_1000"
    manifest = FolderProbe([images], images.with_suffix(".csv")).manifest()
    assert len(manifest) == 1000 and manifest["class_label"].null_count == 0
    assert manifest["class_label"][207].as_py() == "golden retriever"


def test_labels_that_fit_no_image_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\nx.png,cat\n")
    with pytest.raises(MilanError, match="labels none of the images"):
        FolderProbe([tmp_path], tmp_path / "labels.csv").manifest()


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe\xff", b"file,label\n", b"lonely\n"])
def test_labels_unusable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MilanError, match=r"labels\.csv"):
        read_labels(str(path))


def test_digest_changes_with_the_files_and_labels_not_with_recorded_hashes(classes: Path) -> None:
    manifest = FolderProbe([classes]).manifest()
    first = digest(manifest)
    assert digest(FolderProbe([classes]).manifest()) == first
    assert digest(manifest.combine_chunks()) == first
    hashed = manifest.set_column(7, "sha256", [["0" * 64] * len(manifest)])
    assert digest(hashed) == first
    os.utime(classes / "b/2.png", ns=(1, 1))
    assert digest(FolderProbe([classes]).manifest()) != first
