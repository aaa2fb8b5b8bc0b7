"""Analysis through the command line, against ablations counted by hand."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import torch

from milan_ray import cli
from milan_ray.report.figures import figure_path
from milan_ray.schema import ABLATIONS, CRITERIA, DESCRIPTIONS, LAYER_PROPERTIES
from milan_ray.storage import Storage
from milan_ray.studies.spacy_pipeline import find_spacy_pipeline

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
WORDS = {
    "0": ("red houses", "wheel", "striped red boats", "edges", "green cars", "roofs"),
    "2": (*["lines"] * 7, "red striped cups"),
}
PUBLIC = {"experiment": "analysis", "model": "tiny/cnn"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path / "run")
    for layer, texts in WORDS.items():
        columns = {"labeler": "milan", "model": "tiny/cnn", "layer": layer}
        rows = [{**columns, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
        table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
        storage.write(DESCRIPTIONS, table, f"d{layer}", **columns)
    return storage


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> None:
    """The world's own pipeline, in a folder of models of its own."""
    monkeypatch_module.setenv("MILAN_MODELS_DIR", str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.usefixtures("ray_session", "language")
def test_analysis_from_descriptions_to_figure(storage, photos, capsys, dry_run):
    arguments = ["analyze", "--model", "tiny/cnn", "--plugin", PLUGIN, "--layers", "0", "2", "--probe", str(photos)]
    arguments += ["--trials", "2", "--no-report", "--words", "wheel"]
    assert dry_run(storage.root, *arguments) == {"ablations analysis tiny/cnn": "missing"}
    arguments += ["--storage", storage.root]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().err
    assert "the built-in world's sentences" in said and "accuracy on 90 images" in said

    scores = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, **PUBLIC)))
    adjectives = scores.filter(pl.col("criterion") == "adjectives").sort("layer", "unit")
    assert adjectives["score"].to_list() == [1, 0, 2, 0, 1, 0, *[0] * 7, 2]
    similar = scores.filter(pl.col("criterion") == "similar to wheel").sort("score")
    assert similar["description"][-1] == "wheel"

    rows = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **PUBLIC)))
    whole = rows.filter(pl.col("class") == "")
    assert set(whole["condition"]) == {
        "nouns", "verbs", "adpositions", "adjectives", "description-length", "parse-depth", "max-word-difference",
        "similar to wheel", "random",
    }  # fmt: skip
    line = whole.filter(pl.col("condition") == "adjectives")
    assert line["ablated"].to_list() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert line["accuracy"].to_list() == pytest.approx(by_hand(photos, [{}, {"0": [2]}, {"0": [2], "2": [7]}]))
    by_class = rows.filter(pl.col("condition") == "adjectives", pl.col("class") != "", pl.col("ablated") == 2)
    assert by_class.filter(pl.col("fraction") == 0.18)["n"].to_list() == [30, 30, 30]
    assert by_class.filter(pl.col("fraction") == 0.18)["accuracy"].mean() == pytest.approx(line["accuracy"][-1])
    assert whole.filter(pl.col("condition") == "random")["trial"].n_unique() == 2
    properties = pl.DataFrame(pl.from_arrow(storage.read(LAYER_PROPERTIES, **PUBLIC)))
    adjective = properties.filter(pl.col("property") == "contains an adjective").select("layer", "holding", "units")
    assert adjective.rows() == [("0", 3, 6), ("2", 1, 8)]
    assert "  adjectives               0 2 “striped red boats”; 2 7 “red striped cups”; 0 0 “red houses”" in said
    picture = storage.get(figure_path(storage, ABLATIONS, **PUBLIC))
    assert b"<svg" in picture and storage.get(figure_path(storage, ABLATIONS, "png", **PUBLIC))[1:4] == b"PNG"

    assert dry_run(storage.root, *arguments) == {}
    stale = {"ablations analysis tiny/cnn": "analysis changed"}
    for option in (["--seed", "1"], ["--ties", "2"], ["--trials", "3"]):
        assert dry_run(storage.root, *arguments, *option) == stale
    assert not Path(storage.root, "_work").exists()
    storage.put_work(storage.config_of(ABLATIONS, **PUBLIC), "left", pa.table({"by": ["a killed job"]}))
    assert cli.main(arguments) == 0
    assert "analysis of tiny/cnn: up to date" in capsys.readouterr().err
    assert not Path(storage.root, "_work").exists()
    assert cli.main([*arguments, "--labeler", "nobody", "--dry-run"]) == 1
    assert cli.main([*arguments, "--labeler", "nobody"]) == 1
    assert "no descriptions of tiny/cnn 0, 2 by nobody" in capsys.readouterr().err


def by_hand(photos: Path, sets: list[dict[str, list[int]]]) -> list[float]:
    """Accuracy with each set, in the ten steps that they take."""
    from PIL import Image

    from milan_ray.engine.references import ModelRef, model
    from milan_ray.models.ablation import Ablation

    spec = model(ModelRef("tiny/cnn", plugins=(PLUGIN,)))
    files = sorted(photos.rglob("*.png"))
    views = torch.stack([torch.from_numpy(spec.preprocess.view(Image.open(file)).copy()) for file in files])
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    right = Ablation(spec, spec.load(), sets).logits(views).argmax(-1) == labels
    none, one, two = right.float().mean(1).tolist()
    return [none] * 4 + [one] * 4 + [two] * 2


@pytest.mark.usefixtures("language")
def test_pipelines_are_named_in_full(tmp_path):
    nlp, about = find_spacy_pipeline()
    assert "knows no others" in about and nlp("red houses")[0].pos_ == "ADJ"
    nlp.to_disk(tmp_path / "mine")
    assert find_spacy_pipeline(str(tmp_path / "mine"))[1] == "en_trained_on_annotations 0.0.0"
