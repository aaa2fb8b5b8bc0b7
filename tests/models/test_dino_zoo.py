"""DINO's transformer: the published names, and the arithmetic of torch's own encoder layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from milan_ray.models.dino_zoo import VisionTransformer
from milan_ray.models.registry import RANDOM, get_model
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import weights_digest
from milan_ray.plugins import load_plugins

load_plugins()


def test_dino_parameters_have_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = get_model("dino_vits8/imagenet").factory(RANDOM).state_dict()
    block = {
        "norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    }  # fmt: skip
    expected = {
        "cls_token": (1, 1, 384), "pos_embed": (1, 785, 384), "patch_embed.proj.weight": (384, 3, 8, 8),
        "patch_embed.proj.bias": (384,), "norm.weight": (384,), "norm.bias": (384,),
        **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()},
    }  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_dino_computes_what_torch_s_pre_norm_encoder_does() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(patch=4, width=12, heads=3, size=8, depth=2).eval()
    images = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.cls_token.expand(2, 1, 12), patches], dim=1) + model.pos_embed
        block: Any
        for block in model.blocks:
            layer = nn.TransformerEncoderLayer(12, 3, 48, 0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
            attention = {"in_proj_": block.attn.qkv, "out_proj.": block.attn.proj}
            state = {f"self_attn.{to}{name}": p for to, m in attention.items() for name, p in m.named_parameters()}
            others = {"norm1": block.norm1, "norm2": block.norm2, "linear1": block.mlp.fc1, "linear2": block.mlp.fc2}
            state |= {f"{to}.{name}": p for to, m in others.items() for name, p in m.named_parameters()}
            layer.load_state_dict(state)
            tokens = layer(tokens)
        torch.testing.assert_close(model(images), model.norm(tokens)[:, 0], rtol=1e-5, atol=1e-5)


def test_dino_file_is_loaded_strictly(tmp_path: Path) -> None:
    random = get_model("dino_vits16/imagenet").factory(RANDOM)
    torch.save(random.state_dict(), tmp_path / "w.pth")
    loaded = resolve_model("dino_vits16/imagenet", str(tmp_path / "w.pth")).load()
    assert weights_digest(loaded) == weights_digest(random)
