"""The generator of diffusers: a tiny random Stable Diffusion, saved and read as a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.errors import MilanError
from milan_ray.models.diffusion import DEFAULT, PREFIX, find_diffusion
from milan_ray.models.generators import GeneratorRef


def test_a_generator_is_missed_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    with pytest.raises(MilanError) as error:
        find_diffusion(DEFAULT)
    for part in (f"{DEFAULT}/model_index.json", str(tmp_path), "$MILAN_MODELS_DIR", "hf download"):
        assert part in str(error.value)
    with pytest.raises(MilanError, match="nowhere"):
        find_diffusion("/nowhere/sd")


def test_without_diffusers_the_sentence_names_the_extra(tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr("milan_ray.models.folders.importlib.import_module", absent)
    with pytest.raises(MilanError, match=r"pip install 'milan-ray\[dnd\]'"):
        GeneratorRef(f"{PREFIX}{tmp_path}").load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'milan-ray[dnd]'")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    place = tmp_path_factory.mktemp("generators") / "tiny-sd"
    words = ("<|startoftext|>", "<|endoftext|>", "a", "realistic", "photograph", "of", "red", "house", "dog")
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        unk_token="a", model_max_length=16,
    )  # fmt: skip
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(place)
    return str(place)


def test_images_follow_from_text_number_and_seed_alone(folder):
    generator = GeneratorRef(f"{PREFIX}{folder}#2").load().to(torch.device("cpu"))
    first = generator.generate("a realistic photograph of red house", 6, 0)
    assert first.dtype == np.uint8 and first.shape == (6, 32, 32, 3)
    assert len({image.tobytes() for image in first}) == 6 and first.std() > 0
    fewer = generator.generate("a realistic photograph of red house", 5, 0)
    assert np.array_equal(fewer, first[:5])
    again = GeneratorRef(f"{PREFIX}{folder}#2").load()
    assert np.array_equal(again.generate("a realistic photograph of red house", 6, 0), first)
    assert not np.array_equal(generator.generate("a realistic photograph of dog", 6, 0), first)
    assert not np.array_equal(generator.generate("a realistic photograph of red house", 6, 1), first)
    assert type(generator._pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_steps_and_weights_are_part_of_the_identity(folder, tmp_path):
    assert GeneratorRef(f"{PREFIX}{folder}#2").load().identity()["steps"] == 2
    fifty = GeneratorRef(f"{PREFIX}{folder}").load().identity()
    assert fifty["steps"] == 50 and fifty != GeneratorRef(f"{PREFIX}{folder}#2").load().identity()


def test_a_damaged_pipeline_is_one_sentence(folder, tmp_path):
    (tmp_path / "model_index.json").write_bytes(Path(folder, "model_index.json").read_bytes())
    broken = GeneratorRef(f"{PREFIX}{tmp_path}").load()
    with pytest.raises(MilanError, match=r"cannot be loaded .*whole pipeline"):
        broken.generate("dog", 1, 0)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(MilanError, match="names no pipeline"):
        GeneratorRef(f"{PREFIX}{tmp_path}").load()
