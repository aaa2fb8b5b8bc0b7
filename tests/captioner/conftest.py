from pathlib import Path

import pytest
import torch
from toys import toy_captioner

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import load_reference
from milan_ray.captioner.text import Vocabulary

WORDS = ("red", "blue", "dog", "cat", "of", "a", "the", "round", ".")


@pytest.fixture(scope="session")
def toy(golden: Path) -> Captioner:
    """The reference's own small captioner."""
    return load_reference(golden / "milan-toy.pth")


@pytest.fixture
def tiny() -> Captioner:
    """An untrained captioner of a few thousand weights, peaked enough that beams differ, finish and run out of room."""
    vocabulary = Vocabulary(WORDS)
    captioner = toy_captioner("resnet18", vocabulary=vocabulary, sizes=(6, 5, 7), seed=5, length=6, beam_size=5)
    assert captioner.lm is not None
    with torch.no_grad():
        for module in (captioner.decoder, captioner.lm):
            for parameter in module.parameters():
                parameter.mul_(3)
    return captioner


@pytest.fixture
def tiny_features() -> torch.Tensor:
    """Features of 8 units × 3 exemplars for ``tiny``."""
    return torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(1))
