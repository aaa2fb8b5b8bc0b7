"""Untrained networks of five layouts: windows, channels first, pooled tokens, registers, and a view of 256 × 128."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

SQUARE, TALL = Preprocess(View(256, 224)), Preprocess(View((256, 128), None))


def seeded(name: str, **options: Any) -> Callable[[str | None], nn.Module]:
    def build(weights: str | None) -> nn.Module:
        import timm

        torch.manual_seed(0)
        return timm.create_model(name, **options)

    return build


def swin(weights: str | None) -> nn.Module:
    from torchvision.models import swin_t

    torch.manual_seed(0)
    return swin_t()


register_model("layouts/swin", swin, ("features.1", "features.3"), SQUARE)
register_model("layouts/convnext", seeded("convnext_atto"), ("stages.0", "stages.1"), SQUARE)
register_model("layouts/hiera", seeded("hiera_tiny_224"), ("blocks.0", "blocks.2"), SQUARE)
register_model(
    "layouts/dinov3",
    seeded("vit_small_patch16_dinov3", img_size=224),
    ("blocks.0", "blocks.3.mlp.fc1"),
    SQUARE,
)
register_model(
    "layouts/vit",
    seeded("vit_tiny_patch16_224", img_size=(256, 128)),
    ("blocks.0", "blocks.0.mlp.fc1"),
    TALL,
)
