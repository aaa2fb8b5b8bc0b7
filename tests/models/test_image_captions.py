"""Captioners of images: a tiny random BLIP, saved and read as a real one."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.models.image_captions import BATCH_SIZE, ImageCaptionerRef, register_image_captioner

TINY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "plugins/tiny_language.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TINY["save_blip"](tmp_path_factory.mktemp("captioners") / "tiny-blip")


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((40, 48), Image.Resampling.NEAREST)) for one in tiles]


def test_captions_equal_those_of_transformers_one_image_at_a_time(folder):
    found = ImageCaptionerRef(folder).load().to(torch.device("cpu")).caption(images(BATCH_SIZE + 2))
    assert len(found) == BATCH_SIZE + 2
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    for image, caption in zip(images(BATCH_SIZE + 2), found, strict=True):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixel_values=pixels, max_new_tokens=32, min_length=5, do_sample=False)
        decoded = tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert isinstance(decoded, str) and caption == decoded.strip() != ""


def test_a_captioner_is_found_in_the_models_folder_or_missed_with_one_sentence(folder, monkeypatch):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(Path(folder).parent))
    assert ImageCaptionerRef("tiny-blip").load().identity() == ImageCaptionerRef(folder).load().identity()
    with pytest.raises(MilanError) as error:
        ImageCaptionerRef().load()
    for part in ("blip-image-captioning-base/config.json", "$MILAN_MODELS_DIR", "hf download", "--captioner"):
        assert part in str(error.value)
    with pytest.raises(MilanError, match="nowhere"):
        ImageCaptionerRef("/nowhere/blip").load()


def test_what_is_no_captioner_is_one_sentence(save_clip, folder, tmp_path):
    with pytest.raises(MilanError, match="is a model of type 'clip': give the folder of a BLIP captioner"):
        ImageCaptionerRef(save_clip(tmp_path / "clip")).load()
    (tmp_path / "empty").mkdir()
    config = Path(folder, "config.json").read_bytes()
    (tmp_path / "empty/config.json").write_bytes(config)
    with pytest.raises(MilanError, match=r"cannot be loaded .*model.safetensors"):
        ImageCaptionerRef(str(tmp_path / "empty")).load().caption(images(1))


def test_other_weights_are_another_identity(folder, tmp_path):
    changed = transformers.BlipForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    changed.save_pretrained(tmp_path)
    assert ImageCaptionerRef(str(tmp_path)).load().identity() != ImageCaptionerRef(folder).load().identity()


def test_own_captioners_are_found_by_name():
    mine: Any = object()
    register_image_captioner("own", lambda: mine)
    assert ImageCaptionerRef("own").load() is mine
