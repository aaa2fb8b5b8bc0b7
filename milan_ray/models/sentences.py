"""Sentence encoders: any folder of a BERT-like model, with or without the pooling file of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.errors import MilanError, explained
from milan_ray.models.folders import LOCAL, import_transformers
from milan_ray.models.image_text import KINDS, ImageTextRef, find_image_text
from milan_ray.models.registry import BUILDING

TEXTS = 256
"""Texts per pass."""


class SentenceEncoder:
    """A language model that embeds texts by pooling token embeddings; nothing is downloaded.

    Tokens are pooled as set in ``1_Pooling/config.json``, or by their mean where there is no such file.

    Attributes:
        name: The folder's name.
        device: Where it runs.
    """

    def __init__(self, folder: str | Path, device: str | None = None) -> None:
        """Loads a model.

        Args:
            folder: A folder that transformers can load: config, tokenizer, weights.
            device: Torch device; None takes CUDA when there is one.

        Raises:
            MilanError: The folder cannot be loaded, or its pooling is neither the mean nor the first token.
        """
        place = Path(folder).expanduser()
        transformers = import_transformers("models of sentences come")
        self.name = place.name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        needs = "give a folder with config.json, tokenizer and weights of a BERT-like model."
        with BUILDING, explained(f"the language model in {place} cannot be loaded", needs):
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place, **LOCAL)
            self._model: Any = transformers.AutoModel.from_pretrained(place, **LOCAL).float().eval().to(self.device)
        pooling = place / "1_Pooling/config.json"
        with explained(f"{pooling} is damaged", "save the model again.", ValueError):
            modes = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
        if not isinstance(modes, dict):
            raise MilanError(f"{pooling} is no JSON object: save the model again.")
        chosen = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
        self._first = chosen == ["pooling_mode_cls_token"]
        if chosen and not self._first and chosen != ["pooling_mode_mean_tokens"]:
            raise MilanError(
                f"{place} pools tokens by {', '.join(chosen)}: give a model that takes mean or first token."
            )

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as vectors of length 1.

        Args:
            texts: N texts; tokens beyond the model's length are cut off.

        Returns:
            float32 (N, D).
        """
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # similar lengths, little padding
        vectors: list[Tensor] = [torch.zeros(0)] * len(texts)
        longest = self._model.config.max_position_embeddings
        for start in range(0, len(order), TEXTS):
            places = order[start : start + TEXTS]
            batch = self._tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=min(self._tokenizer.model_max_length, longest),
                return_tensors="pt",
            ).to(self.device)
            hidden = self._model(**batch).last_hidden_state
            kept = batch["attention_mask"][:, :, None].to(hidden.dtype)
            pooled = hidden[:, 0] if self._first else (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
            for place, vector in zip(places, F.normalize(pooled, dim=1), strict=True):
                vectors[place] = vector
        return torch.stack(vectors) if vectors else torch.zeros(0, self._model.config.hidden_size, device=self.device)


class EmbedsTexts(Protocol):
    """A model that embeds texts."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as vectors of length 1, float32 (N, D)."""


def load_text_model(name: str) -> EmbedsTexts:
    """Loads the model whose embeddings are used to compare texts.

    Args:
        name: The folder of a language model, or of an image-text model; for the latter also the name of one in
            ``$MILAN_MODELS_DIR``, or a registered name.

    Raises:
        MilanError: The model is missing or damaged.
    """
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        with explained(f"{config} is damaged", "save the model again.", ValueError, AttributeError):
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if kind not in KINDS:
            return SentenceEncoder(name)
    return ImageTextRef(find_image_text(name)).load()
