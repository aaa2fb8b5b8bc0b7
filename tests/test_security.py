"""What an attacker may hand in does nothing; the rest of the attacks are with the modules that they aim at."""

from __future__ import annotations

import ast
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from milan_ray.captioner.checkpoints import load_reference
from milan_ray.engine import references
from milan_ray.engine.references import ModelRef
from milan_ray.errors import MilanError
from milan_ray.models.image_text import ImageText
from milan_ray.models.sentences import SentenceEncoder
from milan_ray.models.weights import read_state_dict
from milan_ray.probe.latents import LatentFiles
from milan_ray.schema import ANNOTATIONS, LEVELS
from milan_ray.scoring.text import BertScore
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import block_of

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "milan_ray").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])

EXECUTING = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "pickle5"}
"""Modules that execute what they read."""

UNPICKLING = {"milan_ray/captioner/checkpoints.py", "milan_ray/models/checkpoints.py"}
"""Where a pickle is read: by unpicklers that know the handful of harmless names that the format needs."""


def called(node: ast.Call) -> str:
    """Dotted name of what is called."""
    return ast.unparse(node.func)


def keywords(node: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def offences(path: Path) -> list[str]:
    """Calls and imports that may execute what a file holds, or run a shell."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in EXECUTING]
        if isinstance(node, ast.ClassDef) and path not in {ROOT / file for file in UNPICKLING}:
            found += [base for base in map(ast.unparse, node.bases) if base.endswith("Unpickler")]
        if not isinstance(node, ast.Call):
            continue
        name, given = called(node), keywords(node)
        if name in ("torch.load", "load") and "torch" in name and given.get("weights_only") != "True":
            found.append(ast.unparse(node))
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(node))
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads"):
            found.append(ast.unparse(node))
        if name.endswith(("read_pickle", "extractall", "tempfile.mktemp")) or name in ("eval", "exec", "os.system"):
            found.append(ast.unparse(node))
        if given.get("shell") == "True":
            found.append(ast.unparse(node))
        if name.endswith("Unpickler") and str(path.relative_to(ROOT)) not in UNPICKLING:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_reads_nothing_that_could_execute(path):
    assert offences(path) == []


def test_offences_are_found(tmp_path):
    """The search above does find what it looks for."""
    bad = tmp_path / "bad.py"
    lines = [
        "import joblib",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "pickle.loads(b)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "class Reader(pickle.Unpickler): ...",
    ]
    bad.write_text("\n".join(lines))
    assert len(offences(bad)) == len(lines)


class Bomb:
    """What creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self):
        return (os.mkdir, (str(self._target),))


def as_torch(path: Path, bomb: Bomb) -> None:
    torch.save({"weight": bomb}, path)


def as_bare_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps({"weight": bomb}))


def as_old_torch(path: Path, bomb: Bomb) -> None:
    torch.save({"weight": bomb}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("make", [as_torch, as_bare_pickle, as_old_torch])
@pytest.mark.parametrize("read", [read_state_dict, load_reference], ids=["weights", "captioner"])
def test_hostile_weights_execute_nothing(make, read, tmp_path):
    target, file = tmp_path / "executed", tmp_path / "hostile.pth"
    make(file, Bomb(target))
    with pytest.raises(MilanError):
        read(file)
    assert not target.exists()


def image_text(folder: Path) -> None:
    ImageText(str(folder))


def network(folder: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    transformers.ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    references.model(ModelRef(f"hf/{folder}")).load()


def sentences(folder: Path) -> None:
    SentenceEncoder(folder, "cpu")


def bert_score(folder: Path) -> None:
    import transformers

    transformers.BertConfig(num_hidden_layers=1).save_pretrained(folder)
    BertScore(folder, num_layers=1, device="cpu")


@pytest.mark.parametrize("make", [as_torch, as_bare_pickle, as_old_torch])
@pytest.mark.parametrize("read", [image_text, network, sentences, bert_score])
def test_hostile_folders_of_transformers_execute_nothing(make, read, save_clip, tmp_path):
    """Whose weights are no safetensors file: transformers reads them by ``weights_only``."""
    pytest.importorskip("transformers")
    target, folder = tmp_path / "executed", tmp_path / "hostile"
    save_clip(folder)
    (folder / "model.safetensors").unlink()
    make(folder / "pytorch_model.bin", Bomb(target))
    with pytest.raises(MilanError, match="cannot be loaded"):
        read(folder)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pth"])
def test_hostile_latents_execute_nothing(suffix, tmp_path):
    target, folder = tmp_path / "executed", tmp_path / "latents"
    folder.mkdir()
    file = folder / f"z{suffix}"
    hostile = np.array([Bomb(target)], dtype=object)
    if suffix == ".npy":
        np.save(file, hostile, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(file, z=hostile)
    else:
        as_torch(file, Bomb(target))
    with pytest.raises(MilanError):
        LatentFiles([file]).manifest()
    assert not target.exists()


EVIL = ("../../evil", "/etc/evil", "..", ".", "a/../../b", "C:\\evil", "\\\\host\\evil", "evil\0", "~root")


@pytest.mark.parametrize("name", EVIL)
def test_names_of_models_and_layers_cannot_leave_the_run_directory(name, tmp_path):
    storage = Storage(tmp_path / "run")
    path = storage.path(LEVELS, model=name, layer=name)
    assert len(Path(path).parts) == 4 and ".." not in Path(path).parts
    storage.put(path, b"x")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "run" / path]
    keys = dict.fromkeys(ANNOTATIONS.partition, name)
    assert ".." not in Path(storage.path(ANNOTATIONS, **keys)).parts


def test_image_ids_are_numbers_and_name_no_other_block():
    """Tables type them as int64, so that no text of theirs becomes part of a path."""
    from milan_ray.schema import EXEMPLARS, MANIFEST, VIEWS

    for table in (EXEMPLARS, MANIFEST, VIEWS):
        assert table.schema.field("image_id").type == pa.int64()
    assert block_of(2**62).isdigit()


def test_zip_members_that_climb_write_nothing_outside(tmp_path):
    from milan_ray.annotations.archive import extract

    archive = tmp_path / "inner" / "evil.zip"
    archive.parent.mkdir()
    for name in ("../evil", "/tmp/milan-ray-evil", "a/../../../evil", "..\\evil"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("fine.txt", "fine")
            file.writestr(name, "evil")
        with pytest.raises(MilanError):
            extract(archive, tmp_path / "inner" / "out")
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != archive]
        assert not Path("/tmp/milan-ray-evil").exists()
        shutil.rmtree(tmp_path / "inner" / "out", ignore_errors=True)


def test_declared_ranges_leave_out_the_versions_of_the_audit():
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| .*CVE.* \| ([\d.]+) \|$", page, re.M)
    declared = dict(re.findall(r'^    "(\w+)(?:\[.*\])?>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    assert len(rows) >= 6
    assert rows == [(name, declared[name]) for name, _ in rows]
