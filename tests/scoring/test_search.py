from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import torch

import milan_ray
from milan_ray.errors import MilanError
from milan_ray.models.sentences import SentenceEncoder
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS
from milan_ray.scoring.search import scan_descriptions, search_descriptions
from milan_ray.scoring.text import minilm_directory
from milan_ray.storage import EXEMPLARS_KEY, Storage

TEXTS = ("Dog faces", "a face", "red stripes on the faces of people", "surfaces", "striped red cloth", "cats")


def write(
    storage: Storage, model: str, layer: str, texts: Sequence[str], labeler: str = "milan", of: str = "e"
) -> None:
    columns = {"labeler": labeler, "model": model, "layer": layer}
    rows = [{**columns, "unit": u, "description": t, "score": -float(u), "n_best": []} for u, t in enumerate(texts)]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table.replace_schema_metadata({EXEMPLARS_KEY: of}), "d", **columns)
    exemplars = EXEMPLARS.schema.empty_table()
    storage.write(EXEMPLARS, exemplars, "e", model=model, layer=layer)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    found = Storage(tmp_path_factory.mktemp("search"))
    write(found, "net/a", "conv1", TEXTS)
    write(found, "net/b", "0", ("faces", "none"), "netdissect")
    write(found, "old", "0", ("faces",), of="earlier")
    return found


def units(found: pl.DataFrame) -> list[tuple[str, int]]:
    return list(zip(found["model"], found["unit"], strict=True))


def test_search_ranks_by_bm25_and_finds_inflections_of_whole_words(storage: Storage, capsys) -> None:
    found = milan_ray.search(storage.root, "faces")
    assert "left out 1 tables of descriptions" in capsys.readouterr().err
    assert units(found) == [("net/b", 0), ("net/a", 0), ("net/a", 1), ("net/a", 2)]
    assert found.columns == ["relevance", "mentions", "labeler", "model", "layer", "unit", "description", "score"]
    # BM25 by hand: 8 texts, 4 with the word, 17 words in all.
    mean = 18 / 8
    idf = torch.log1p(torch.tensor((8 - 4 + 0.5) / (4 + 0.5))).item()
    expected = [idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * length / mean)) for length in (1, 2, 2, 7)]
    assert found["relevance"].to_list() == pytest.approx(expected)


def test_search_wants_all_words_or_any(storage: Storage) -> None:
    frame = scan_descriptions(storage)
    assert units(search_descriptions(frame, "red striped")) == [("net/a", 4), ("net/a", 2)]
    assert len(search_descriptions(frame, "red cat", any_word=True)) == 3
    assert search_descriptions(frame, "red cat").is_empty()
    assert units(search_descriptions(frame, '"people|cats')) == [("net/a", 5), ("net/a", 2)]


def test_search_filters_by_pattern(storage: Storage) -> None:
    assert units(milan_ray.search(storage, "faces", labelers=["net*"])) == [("net/b", 0)]
    assert units(milan_ray.search(storage, "faces", models=["net/a"], top=1)) == [("net/a", 0)]
    with pytest.raises(MilanError, match="nearest: net/b, net/a"):
        milan_ray.search(storage, "faces", models=["net/c"])
    with pytest.raises(MilanError, match="leave one filter out"):
        milan_ray.search(storage, "faces", models=["net/a"], layers=["0"])
    with pytest.raises(MilanError, match="holds no descriptions"):
        milan_ray.search(Path(storage.root) / "nothing", "faces")


def test_search_works_on_any_frame() -> None:
    frame = pl.DataFrame({"description": ["faces", None, "a cat"], "where": [1, 2, 3]})
    assert milan_ray.search(frame, "face").rows()[0][1:] == (True, "faces", 1)
    assert milan_ray.search(frame.head(0), "face").is_empty()


class _Letters:
    """Embeds a text by how often it has each letter."""

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts], dtype=torch.float32)
        return torch.nn.functional.normalize(counts, dim=1)


def test_search_by_meaning_ranks_every_unit_by_cosine(storage: Storage) -> None:
    found = search_descriptions(scan_descriptions(storage, models=["net/a"]), "cafe", model=_Letters())
    assert len(found) == len(TEXTS) and found["description"][0] == "a face"
    assert found["relevance"].is_sorted(descending=True) and not found["mentions"].any()
    assert len(search_descriptions(scan_descriptions(storage), "cafe", model=_Letters(), top=3)) == 3


def test_search_scales_over_equal_descriptions() -> None:
    rows = pl.DataFrame({"unit": range(300_000)}).lazy().with_columns(
        pl.when(pl.col("unit") % 1000 == 7).then(pl.lit("dog faces")).otherwise(pl.lit("lines")).alias("description")
    )  # fmt: skip
    found = search_descriptions(rows, "face", top=5)
    assert found["unit"].to_list() == [7, 1007, 2007, 3007, 4007]


@pytest.mark.skipif(minilm_directory() is None, reason="needs pip install 'milan-ray[minilm]'")
def test_sentence_encoder_knows_what_is_alike_whatever_the_company() -> None:
    folder = minilm_directory()
    assert folder is not None
    model = SentenceEncoder(folder, "cpu")
    texts = ["dogs", "puppies playing in the grass of a park", "letters on a sign", "written text"]
    vectors = model.embed_texts(texts)
    similar = vectors @ vectors.T
    assert torch.allclose(similar.diagonal(), torch.ones(4), atol=1e-5)
    assert similar[0, 1] > similar[0, 2] and similar[2, 3] > similar[0, 3]
    alone = torch.cat([model.embed_texts([text]) for text in texts])
    assert torch.allclose(vectors, alone, atol=1e-5)
    assert model.embed_texts([]).shape == (0, 384)


def test_sentence_encoder_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="give a folder with config"):
        SentenceEncoder(tmp_path)
