"""Tiny random models of images and texts, saved as anybody's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIZE, PATCH = 30, 6
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "red", "house", "dog", "dogs", "on", "grass", "dark", "areas", "the")


def save_clip(folder: Path, kind: str = "clip", dtype: torch.dtype = torch.float32) -> str:
    """Saves a tiny random model with tokenizer and image processor, as transformers does; returns the folder."""
    ids = {word: number for number, word in enumerate(WORDS)}
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": len(ids), "max_position_embeddings": 10, "pad_token_id": 0, "bos_token_id": 1}
    vision = {"image_size": SIZE, "patch_size": PATCH, **size}
    torch.manual_seed(0)
    model: Any
    if kind == "clip":
        clip = transformers.CLIPConfig(
            text_config={**text, **size, "eos_token_id": 2, "projection_dim": 12},
            vision_config={**vision, "projection_dim": 12},
            projection_dim=12,
        )
        model = transformers.CLIPModel(clip)
    else:
        siglip = transformers.SiglipConfig(
            text_config={**text, **size, "eos_token_id": 2, "projection_size": 16}, vision_config=vision
        )
        model = transformers.SiglipModel(siglip)
    for parameter in model.parameters():  # far from the symmetric state that training starts from
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    rules = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    processor = transformers.CLIPImageProcessor if kind == "clip" else transformers.SiglipImageProcessor
    processor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return str(folder)
