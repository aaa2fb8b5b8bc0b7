"""Hand-made tensors for files of features, and how a reading is compared with a formula."""

from __future__ import annotations

from collections.abc import Callable

import torch

from milan_ray.models.features.dictionary import Dictionary

FEATURES, WIDTH, POSITIONS = 12, 5, 9


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for a shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape)))


def outputs() -> torch.Tensor:
    """A layer's outputs (POSITIONS, WIDTH)."""
    return 2 * random(POSITIONS, WIDTH, seed=8) + 1


def common() -> dict[str, torch.Tensor]:
    """The tensors of most projects."""
    return {
        "W_enc": random(WIDTH, FEATURES),
        "b_enc": random(FEATURES),
        "W_dec": random(FEATURES, WIDTH, seed=1),
        "b_dec": random(WIDTH),
    }


def top(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Pre-activations with all but the k largest of each row set to 0."""
    kept = torch.zeros_like(pre)
    for row, values in enumerate(pre.tolist()):
        for feature in sorted(range(len(values)), key=lambda feature: -values[feature])[:k]:
            kept[row, feature] = values[feature]
    return kept


def assert_follows(
    dictionary: Dictionary, formula: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Compares codes and reconstructions with those of a formula: outputs → codes, reconstructions."""
    x = outputs()
    codes, back = formula(x)
    assert int((codes != 0).sum()) > 0
    torch.testing.assert_close(dictionary.encode(x), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(x), back, rtol=1e-4, atol=1e-4)
