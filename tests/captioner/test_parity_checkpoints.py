import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import (
    export_reference,
    export_reference_lm,
    from_bytes,
    load_reference,
    load_reference_lm,
    to_bytes,
)
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.quirks import REFERENCE

like_the_reference = pytest.mark.skipif(
    importlib.util.find_spec("confection._config") is None,
    reason="the reference's files hold a configuration of spaCy 3.8, whose class this spaCy lacks",
)


@pytest.mark.parametrize(("encoder", "feature_size"), [("resnet18", 1024), ("resnet101", 3904)])
def test_default_sizes_golden_names_and_shapes_identical(golden: Path, encoder: str, feature_size: int) -> None:
    record = json.loads((golden / "language/default_size_state_dict_shapes.json").read_text())
    state = Decoder(DecoderConfig(129, feature_size)).state_dict()
    state.update({f"lm.{name}": tensor for name, tensor in LanguageModel(LMConfig(129)).state_dict().items()})
    assert {name: list(tensor.shape) for name, tensor in state.items()} == record[encoder]


def test_golden_checkpoint_every_setting_and_weight_is_read(golden: Path, toy: Captioner) -> None:
    record = json.loads((golden / "language/checkpoint_structure.json").read_text())
    assert (toy.encoder_name, toy.length, toy.beam_size, toy.lam) == ("resnet18", 15, 50, 0.2)
    assert toy.lm is not None and toy.encoder_state is not None
    read = dict(toy.decoder.state_dict())
    read.update({f"lm.{name}": tensor for name, tensor in toy.lm.state_dict().items()})
    read.update({f"encoder.encoder.model.{name}": tensor for name, tensor in toy.encoder_state.items()})
    expected = {name: shape for name, (shape, _) in record["structure"]["state_dict"].items()}
    del expected["encoder.mean"], expected["encoder.std"]  # constants of the encoder's specification
    assert {name: list(tensor.shape) for name, tensor in read.items()} == expected


def test_golden_checkpoint_through_our_format_gives_the_same_answers(golden: Path, toy: Captioner) -> None:
    copy = from_bytes(to_bytes(toy))
    features = torch.randn(3, 5, 1024, generator=torch.Generator().manual_seed(0))
    assert copy.describe(features, n_best=5, quirks=REFERENCE) == toy.describe(features, n_best=5, quirks=REFERENCE)


def assert_structure(found: Any, expected: Any) -> None:
    """Compares with the notation of the golden file: "tuple[n] of" first items, "dict[n]", "bytes[n]", "type: repr"."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_structure(found[key], value)
    elif isinstance(found, torch.Tensor):
        assert [list(found.shape), str(found.dtype)] == expected
    elif isinstance(expected, list):
        assert f"tuple[{len(found)}] of" == expected[0] and isinstance(found, tuple)
        for one, value in zip(found, expected[1:], strict=False):
            assert_structure(one, value)
    elif isinstance(found, dict):
        assert f"dict[{len(found)}]" == expected
    elif isinstance(found, bytes):
        assert expected.startswith("bytes[")  # as long as the tokenizer has seen words
    else:
        assert f"{type(found).__name__}: {found!r}" == expected


@like_the_reference
def test_export_golden_captioner_has_the_structure_of_the_reference_file(
    golden: Path, toy: Captioner, tmp_path: Path
) -> None:
    export_reference(toy, tmp_path / "milan-toy.pth")
    record = json.loads((golden / "language/checkpoint_structure.json").read_text())
    content = torch.load(tmp_path / "milan-toy.pth", weights_only=False)
    assert_structure(content, record["structure"])
    theirs = torch.load(golden / "milan-toy.pth", weights_only=False)
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in content["state_dict"].items())
    assert (
        content["properties"]["indexer"]["properties"]["vocab"]
        == theirs["properties"]["indexer"]["properties"]["vocab"]
    )
    assert to_bytes(load_reference(tmp_path / "milan-toy.pth")) == to_bytes(toy)


@like_the_reference
def test_export_golden_language_model_has_the_structure_of_the_reference_file(golden: Path, tmp_path: Path) -> None:
    indexer, lm = load_reference_lm(golden / "language/lm.pth")
    export_reference_lm(indexer, lm, tmp_path / "lm.pth")
    ours = torch.load(tmp_path / "lm.pth", weights_only=False)
    theirs = torch.load(golden / "language/lm.pth", weights_only=False)
    assert list(ours) == list(theirs) and ours["children"] == theirs["children"]
    record = json.loads((golden / "language/checkpoint_structure.json").read_text())["structure"]["properties"]["lm"]
    assert_structure(ours["properties"], record["properties"])
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in ours["state_dict"].items())
