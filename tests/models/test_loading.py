"""Models of transformers are read one at a time: it changes its own classes meanwhile."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from milan_ray.models.chat import LocalChat
from milan_ray.models.folders import MINILM, packaged_folder
from milan_ray.models.image_captions import Blip
from milan_ray.models.image_text import ImageText
from milan_ray.models.registry import BUILDING
from milan_ray.models.segmentation import Segmenter
from milan_ray.models.sentences import SentenceEncoder
from milan_ray.scoring.text import BertScore
from tests.plugins.tiny_clip import save_clip

TINY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "plugins/tiny_language.py"))


def minilm() -> str:
    package = packaged_folder(MINILM)
    if package is None:
        pytest.skip("needs pip install 'milan-ray[minilm]'")
    return str(package / "model")


def segformer(folder: Path) -> str:
    config = transformers.SegformerConfig(num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8],
        patch_sizes=[7], strides=[4], num_attention_heads=[1], mlp_ratios=[2], decoder_hidden_size=8)  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor().save_pretrained(folder)
    return str(folder)


READ: dict[str, Callable[[Path], object]] = {
    "a language model": lambda folder: LocalChat(TINY["save_llm"](folder))._loaded,
    "a captioner": lambda folder: Blip(TINY["save_blip"](folder))._loaded,
    "CLIP": lambda folder: ImageText(save_clip(folder)),
    "sentences": lambda folder: SentenceEncoder(minilm(), "cpu"),
    "BERTScore": lambda folder: BertScore(minilm(), device="cpu"),
    "segmentation": lambda folder: Segmenter(segformer(folder))._loaded,
}


@pytest.mark.parametrize("name", READ)
def test_a_model_of_transformers_is_read_while_no_other_one_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would leave its classes as they are in the middle of reading, without tied weights."""
    free: list[bool] = []
    original = transformers.PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]  # of a class method

    def watched(kind: Any, *arguments: Any, **named: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(BUILDING.acquire, False).result())
            if free[-1]:
                other.submit(BUILDING.release).result()
        return original(kind, *arguments, **named)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(watched))
    READ[name](tmp_path / "model")
    assert free == [False]
