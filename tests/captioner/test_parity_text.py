import json
import pickle
from pathlib import Path

import pytest

from milan_ray.captioner.text import Indexer, Tokenizer, Vocabulary


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict:
    return json.loads((golden / "language/indexer.json").read_text())


@pytest.fixture(scope="module")
def indexer(reference: dict) -> Indexer:
    return Indexer(Vocabulary(tuple(reference["vocab_tokens"])))


def test_tokenizer_golden_texts_tokens_identical(reference: dict) -> None:
    tokenizer = pickle.loads(pickle.dumps(Tokenizer()))
    assert [tokenizer(text) for text in reference["texts"]] == reference["tokenized"]


def test_vocabulary_golden_annotations_order_identical(reference: dict) -> None:
    texts = reference["annotation_texts"]
    units = [texts[i : i + 3] for i in range(0, len(texts), 3)]
    assert list(Vocabulary.build(units).words) == reference["vocab_tokens"]


def test_indexer_special_ids_identical(indexer: Indexer, reference: dict) -> None:
    ids = indexer.ids
    assert [ids.start, ids.stop, ids.pad, ids.unk, ids.total] == [
        reference[name] for name in ("start", "stop", "pad", "unk", "len")
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("indexed_default", {}),
        ("indexed_nostart_stop_nopad", {"start": False, "pad": False}),
        ("indexed_length5", {"length": 5}),
        ("indexed_nounk", {"unk": False}),
        ("indexed_nospecial", {"start": False, "stop": False, "pad": False, "unk": False}),
    ],
)
def test_indexer_golden_texts_ids_identical(indexer: Indexer, reference: dict, name: str, options: dict) -> None:
    assert indexer.index(reference["texts"], **options) == reference[name]


def test_indexer_single_text_ids_identical(indexer: Indexer, reference: dict) -> None:
    assert indexer.index([reference["texts"][1]])[0] == reference["single"]


def test_reconstruct_golden_ids_texts_identical(indexer: Indexer, reference: dict) -> None:
    assert [indexer.reconstruct(ids) for ids, _ in reference["reconstruct"]] == [t for _, t in reference["reconstruct"]]
