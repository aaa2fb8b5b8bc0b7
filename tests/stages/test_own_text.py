"""Own text of own exemplars: one command brings a CSV into the storage, and another trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.schema import ANNOTATIONS, EXEMPLARS
from milan_ray.stages.captioners import load_captioner
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CSV = """layer,unit,summary
0,0,red houses
0,1,people's dogs
0,1,"dogs, cats"
2,3,houses
2,6,cats
"""


@pytest.fixture(scope="module")
def storage(ray_session, photos, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run directory with exemplars of two layers."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    model = ModelRef("tiny/cnn", layers=("0", "2"), plugins=(PLUGIN,))
    Exemplars([model], ProbeRef((str(photos),)), ExemplarConfig(k=3)).run(storage, Resources())
    return storage


def test_a_captioner_is_trained_on_own_text_by_two_commands(storage: Storage, tmp_path: Path, capsys) -> None:
    where = ["--storage", storage.root]
    (tmp_path / "mine.CSV").write_text(CSV, encoding="utf-8")
    importing = ["annotations", "import", str(tmp_path / "mine.CSV"), "--model", "tiny/cnn", "--source", "mine", *where]
    assert cli.main(importing) == 0
    said = capsys.readouterr().err
    assert "5 annotations of tiny/cnn" in said and "jobs.train --annotations mine" in said
    for layer in ("0", "2"):
        keys = {"model": "tiny/cnn", "layer": layer}
        assert storage.exemplars_of(ANNOTATIONS, source="mine", **keys) == storage.config_of(EXEMPLARS, **keys)
    training = ["train", "--annotations", "mine", "--encoder", "tiny", "--plugin", PLUGIN, "--epochs", "2", *where]
    sizes = ["--hidden", "8", "--embedding", "4"]
    assert cli.main([*training, *sizes]) == 0
    known = set(load_captioner(storage, "mine").indexer.vocabulary.words)
    assert known >= {"red", "houses", "people", "'s", "dogs", ",", "cats"}


def test_layers_choose_the_rows_that_are_used_and_checked(storage: Storage, tmp_path: Path, capsys) -> None:
    file, where = tmp_path / "more.csv", ["--storage", storage.root]
    file.write_text(f"{CSV}conv5,0,text\n", encoding="utf-8")
    command = ["annotations", "import", str(file), "--model", "tiny/cnn", "--source", "chosen", *where]
    assert cli.main(command) == 1
    assert "line 7: unknown layer with exemplars 'conv5'" in capsys.readouterr().err
    assert cli.main([*command, "--layers", "2"]) == 0
    assert [keys["layer"] for keys in storage.partitions(ANNOTATIONS, source="chosen")] == ["2"]
