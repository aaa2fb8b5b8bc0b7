"""`jobs.doctor`: what it looks at is really there or not, and it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.doctor import Check, Diagnosis, check_storage, memory, wrong_versions
from milan_ray.storage import Storage


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without weights, captioners or data."""
    for variable in ("MILAN_MODELS_DIR", "MILAN_DATA_DIR", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    status = cli.main(["doctor", "--no-ray", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is (status == 0)
    return status, {check["name"]: check for check in found["checks"]}


def test_doctor_says_of_everything_missing_what_works_without_it_and_how_to_get_it(nothing, capsys) -> None:
    status, checks = doctor(capsys, "--storage", str(nothing / "run"))
    assert status == 0
    for name in ("weights", "captioners", "encoder", "CLIP", "MILANNOTATIONS"):
        assert checks[name]["state"] == "missing"
    for check in checks.values():
        if check["state"] != "ok":
            assert check["without"] and check["remedy"], check
    assert str(nothing / "MILAN_MODELS_DIR") in checks["weights"]["found"]
    assert checks["storage"]["state"] == checks["packages"]["state"] == checks["torch"]["state"] == "ok"
    assert checks["Ray"]["found"].endswith("not started")
    assert not (nothing / "run").exists()  # it was not there before


def test_doctor_finds_what_lies_here(nothing, capsys) -> None:
    models = nothing / "MILAN_MODELS_DIR"
    models.mkdir()
    for file in ("milan-base.pth", "resnet18-f37072fd.pth", "resnet101-63fe2227.pth"):
        (models / file).touch()
    trained = nothing / "run/captioners/mine"
    trained.mkdir(parents=True)
    (trained / "config.json").touch()
    _, checks = doctor(capsys, "--storage", str(nothing / "run"))
    assert "resnet18/imagenet" in checks["weights"]["found"] and checks["encoder"]["state"] == "ok"
    assert "milan-base.pth" in checks["captioners"]["found"] and "mine" in checks["captioners"]["found"]
    assert [path.name for path in (nothing / "run").iterdir()] == ["captioners"]


def test_doctor_fails_where_the_storage_cannot_be_written(nothing, capsys) -> None:
    blocked = nothing / "file"
    blocked.write_text("in the way")
    assert cli.main(["doctor", "--no-ray", "--storage", str(blocked / "run")]) == 1
    out = capsys.readouterr().out
    assert "failed   storage" in out and "another --storage" in out and "must be mended" in out


def test_storage_that_keeps_or_changes_files_fails(tmp_path, monkeypatch) -> None:
    storage = Storage(tmp_path)
    assert check_storage(storage).state == "ok"
    monkeypatch.setattr(Storage, "get", lambda *_: b"other bytes")
    assert check_storage(storage).state == "failed"
    monkeypatch.undo()
    monkeypatch.setattr(Storage, "remove_file", lambda *_: None)
    assert check_storage(storage).state == "failed"


def test_versions_are_compared_with_what_is_declared() -> None:
    declared = ["torch>=2.10", "numpy>=1.26", "absent>=1", 'optuna>=4; extra == "optuna"']
    installed = {"torch": "2.9.1", "numpy": "2.0"}
    assert wrong_versions(declared, installed.get) == ["torch is 2.9.1, wanted is >=2.10", "absent is not installed"]


def test_optional_things_missing_are_no_failure() -> None:
    checks = (Check("a", "ok", "here"), Check("b", "missing", "not here", "all else", "get it"))
    assert Diagnosis(checks).ok and not Diagnosis((*checks, Check("c", "failed", "broken"))).ok
    assert Diagnosis(checks).text().splitlines()[-1] == "1 ok, 1 missing, 0 failed: everything needed is here."


def test_memory_is_positive_and_free_is_within_it() -> None:
    total, free = memory()
    assert 0 < free <= total
