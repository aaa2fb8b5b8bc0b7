import json
from pathlib import Path

import numpy as np
import pytest

from milan_ray.annotations.layout import write_annotations
from milan_ray.captioner.language_model import main, read_split, train_language_model
from milan_ray.captioner.lm import LMConfig
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError

TEXTS = ("red dog", "blue cats", "a red house on the left", "grass", "dark areas of pictures")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Forty annotated units of two annotations; every tenth is held out, and says a word that no other one does."""
    rng = np.random.default_rng(0)
    units = [("0", unit) for unit in range(40)]
    rows = [(layer, unit, str(rng.choice(TEXTS))) for layer, unit in units for _ in range(2)]
    rows[14] = ("0", 7, "unheard")
    write_annotations(tmp_path / "a.csv", rows)
    split = {"train": [key for key in units if key[1] % 10 != 7], "val": [key for key in units if key[1] % 10 == 7]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    return tmp_path / "a.csv", tmp_path / "split.json"


def test_train_language_model_learns_and_keeps_the_best_epoch(files: tuple[Path, Path]) -> None:
    split = read_split(*files)
    assert [len(part) for part in split] == [36, 4] and split[1][0][0] == "unheard"
    config = TrainingConfig(max_epochs=12, learning_rate=0.02, lm_batch_size=16)
    found = train_language_model(split, config, LMConfig(0, 8, 16))
    assert found["validation"].min() < found["validation"][0] - 0.5
    assert found.filter("kept")["validation"].item() == found["validation"].min()
    np.testing.assert_allclose(found["perplexity"].log(), found["validation"])


def test_language_model_command_prints_perplexity(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(files[0]), str(files[1]), "--epochs", "1"]) == 0
    assert "nats per token, perplexity" in capsys.readouterr().out
    files[1].write_text('{"train": []}')
    assert main([str(files[0]), str(files[1])]) == 1
    assert "give JSON with lists train and val" in capsys.readouterr().err


def test_read_split_without_annotated_units_is_an_error(files: tuple[Path, Path]) -> None:
    files[1].write_text(json.dumps({"train": [["0", 1]], "val": [["9", 1]]}))
    with pytest.raises(MilanError, match="names no annotated units"):
        read_split(*files)
