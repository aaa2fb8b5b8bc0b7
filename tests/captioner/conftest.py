from pathlib import Path

import pytest
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import load_reference
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary

WORDS = ("red", "blue", "dog", "cat", "of", "a", "the", "round", ".")


@pytest.fixture(scope="session")
def toy(golden: Path) -> Captioner:
    """The reference's own small captioner."""
    return load_reference(golden / "milan-toy.pth")


@pytest.fixture
def tiny() -> Captioner:
    """An untrained captioner of a few thousand weights, peaked enough that beams differ, finish and run out of room."""
    torch.manual_seed(5)
    decoder = Decoder(DecoderConfig(len(WORDS), feature_size=6, embedding_size=5, hidden_size=7))
    lm = LanguageModel(LMConfig(len(WORDS), embedding_size=5, hidden_size=7))
    with torch.no_grad():
        for module in (decoder, lm):
            for parameter in module.parameters():
                parameter.mul_(3)
    return Captioner(Indexer(Vocabulary(WORDS)), decoder, lm, "resnet18", length=6, beam_size=5)


@pytest.fixture
def tiny_features() -> torch.Tensor:
    """Features of 8 units × 3 exemplars for ``tiny``."""
    return torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(1))
