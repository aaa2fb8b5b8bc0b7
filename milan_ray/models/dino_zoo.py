"""DINO's vision transformers (Caron et al. 2021), registered as ``dino_vits8/imagenet`` and so on.

Works like a user's plug-in: importing the module registers the models. Modules are named as in the published files.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from milan_ray.models.registry import TOKEN_BATCH, build_seeded, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import WeightsFile

HOST = "https://dl.fbaipublicfiles.com/dino"
DEPTH = 12


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, C) → (B, T, C)."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; the dissected units are those of the first layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, C) → (B, T, C)."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """A transformer block with its norms before attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, C) → (B, T, C)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Module):
    """Splits images into patches, and embeds each patch as a token."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) → tokens (B, H/p · W/p, C), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer without a head: its output is the normed CLS token (B, C).

    Args:
        patch: Side of a patch, pixels.
        width: Size of a token.
        heads: Attention heads.
        size: Side of the images, pixels.
        depth: Blocks.
    """

    def __init__(self, patch: int, width: int, heads: int, size: int = 224, depth: int = DEPTH) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) → (B, C)."""
        patches = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


def build(patch: int, width: int, heads: int, weights: str | None) -> nn.Module:
    """Builds a model with its weights; ``random`` gives untrained ones from seed 0.

    Raises:
        MilanError: The file is missing or does not fit.
    """
    return build_seeded(partial(VisionTransformer, patch, width, heads), weights)


for _name, _file, _patch, _width, _heads in (
    ("vits8", "deitsmall8", 8, 384, 6),
    ("vits16", "deitsmall16", 16, 384, 6),
    ("vitb8", "vitbase8", 8, 768, 12),
    ("vitb16", "vitbase16", 16, 768, 12),
):
    register_model(
        f"dino_{_name}/imagenet",
        partial(build, _patch, _width, _heads),
        tuple(f"blocks.{i}.mlp.fc1" for i in range(DEPTH)),
        Preprocess(View()),
        prefix_tokens=1,
        max_batch=TOKEN_BATCH,
        published={
            "PRETRAIN": WeightsFile.at(
                f"{HOST}/dino_{_file}_pretrain/dino_{_file}_pretrain.pth", f"dino_{_name}/imagenet.pth"
            )
        },
    )
