"""A small untrained captioner, of which each test chooses what matters to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.stages.training import Training, TrainingJob, _train_in_task
from milan_ray.storage import Storage

TEXTS = [["the red house", "dark areas"], ["a dog", "dogs on grass"]]
"""What people say of two units; their words are the vocabulary."""


def toy_captioner(
    encoder: str = "tiny",
    encoder_state: Mapping[str, Tensor] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    sizes: tuple[int, int, int] = (10, 8, 12),
    seed: int = 0,
    length: int = 15,
    beam_size: int = 50,
    lam: float = 0.2,
) -> Captioner:
    """An untrained captioner with a language model; the same arguments give the same weights.

    Args:
        encoder: Name of its encoder. "tiny" is that of ``tests/plugins/tiny_models.py``.
        encoder_state: The weights of the encoder's backbone, if they are stored with it.
        vocabulary: The words that it can say; None means those of :data:`TEXTS`.
        sizes: The sizes of a feature (10 is that of "tiny"), of a token's embedding and of the LSTMs' states.
        seed: Of its weights.
        length: Maximum tokens of a description.
        beam_size: Beams per unit.
        lam: λ.
    """
    vocabulary = Vocabulary.build(TEXTS) if vocabulary is None else vocabulary
    torch.manual_seed(seed)
    feature_size, embedding_size, hidden_size = sizes
    decoder = Decoder(DecoderConfig(len(vocabulary), feature_size, embedding_size, hidden_size))
    lm = LanguageModel(LMConfig(len(vocabulary), embedding_size, hidden_size))
    return Captioner(Indexer(vocabulary), decoder, lm, encoder, encoder_state, length, beam_size, lam)


def train_here(storage: Storage, job: TrainingJob) -> None:
    """Trains a captioner that is not up to date, as a task does, in this process: Ray Train takes longer to start.

    Raises:
        AssertionError: The training failed.
    """
    fingerprint = Training(job).due(storage)
    if fingerprint is not None:
        trained, line = _train_in_task(storage, (job, fingerprint))
        assert trained, line
