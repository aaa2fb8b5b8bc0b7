"""Tiny random models that write text, saved as anybody's would be."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[BOS]",
    "a",
    "red",
    "house",
    "dog",
    "dogs",
    "on",
    "grass",
    "user",
    "system",
    "assistant",
    ":",
    "-",
    "Caption",
    ".",
    "dark",
    "areas",
)
SIZE = 32
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}assistant :"


def _tokenizer(folder: Path, kind: type, **special: str) -> None:
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    kind(tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]", **special).save_pretrained(folder)


def save_llm(folder: Path, template: str | None = TEMPLATE) -> str:
    """Saves a tiny random Llama with its tokenizer, with or without a chat template; returns the folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=4, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    extra = {"chat_template": template} if template else {}
    _tokenizer(folder, transformers.PreTrainedTokenizerFast, bos_token="[BOS]", eos_token="[SEP]", **extra)
    return str(folder)


def save_blip(folder: Path) -> str:
    """Saves a tiny random BLIP for captions with tokenizer and image processor; returns the folder."""
    torch.manual_seed(1)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={
            **size, "vocab_size": len(WORDS), "max_position_embeddings": 64, "encoder_hidden_size": 16,
            "bos_token_id": 4, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3,
        },
        vision_config={**size, "image_size": SIZE, "patch_size": 8},
    )  # fmt: skip
    model = transformers.BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    _tokenizer(folder, transformers.PreTrainedTokenizerFast, bos_token="[BOS]", sep_token="[SEP]", cls_token="[CLS]")
    transformers.BlipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)


def save_gguf(folder: Path) -> str:
    """Saves a tiny random Llama as a GGUF file, with a chat template; needs gguf. Returns the folder."""
    import gguf

    folder.mkdir(parents=True)
    tokens = [
        "<pad>",
        "<s>",
        "</s>",
        *(chr(code) for code in range(33, 127)),
        "Ġ",
        "Ċ",
        "ab",
    ]  # bytes as GPT-2 writes them
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE.replace(" [SEP] ", "\n"))
    torch.manual_seed(0)
    square = [f"attn_{name}" for name in ("q", "k", "v", "output")]
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (32, 32) for name in square}
        shapes |= {f"blk.{block}.{name}": (64, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (32, 64)}
        shapes |= {f"blk.{block}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)
