import json
from pathlib import Path

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import from_bytes, to_bytes
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.quirks import REFERENCE


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
