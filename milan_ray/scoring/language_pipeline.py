"""Trains a small spaCy pipeline from annotated sentences, for use if no published one is available."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example

EPOCHS = 4
UPDATES = 150
"""Minimum number of updates, even for few sentences."""
BATCH = 32
WINDOW = 4
"""Number of words on each side that count as a word's context."""


@dataclass(frozen=True)
class Sentence:
    """A sentence with its grammar.

    Attributes:
        words: Tokens.
        tags: Universal part-of-speech tag of each token.
        heads: Position of each token's head, counted from 1; 0 for the root (CoNLL-U).
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    heads: tuple[int, ...]


def train_language(
    sentences: Sequence[Sentence], seed: int = 0, epochs: int = EPOCHS, dimensions: int = 16
) -> Language:
    """Trains a tagger and a dependency parser, and computes word vectors from co-occurrence.

    Takes seconds for a few thousand short sentences. The pipeline is good only for their vocabulary; use a published
    pipeline for other texts.

    Args:
        sentences: Sentences with tags and heads; duplicates are used once.
        seed: Seed of the initial weights and of the order of sentences.
        epochs: Minimum number of passes over the distinct sentences.
        dimensions: Length of word vectors; at most the number of distinct words.

    Returns:
        A pipeline with tok2vec, morphologizer and parser, and vectors for every word seen.
    """
    distinct = list(dict.fromkeys(sentences))
    nlp = spacy.blank("en")
    for name in ("tok2vec", "morphologizer", "parser"):
        config: dict[str, object] = {} if name == "tok2vec" else {"model": _listening(nlp, name)}
        if name == "parser":
            config["min_action_freq"] = 1  # otherwise relations that occur fewer than 30 times are dropped
        nlp.add_pipe(name, config=config)
    examples = [_example(nlp, sentence) for sentence in distinct]
    spacy.util.fix_random_seed(seed)
    order = random.Random(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\[W\d+\]")
        optimizer = nlp.initialize(lambda: examples)
        batches = -(-len(examples) // BATCH)
        for _ in range(max(epochs, -(-UPDATES // batches))):
            order.shuffle(examples)
            for start in range(0, len(examples), BATCH):
                nlp.update(examples[start : start + BATCH], sgd=optimizer, drop=0.1)
    words, vectors = word_vectors([sentence.words for sentence in sentences], dimensions)
    nlp.vocab.reset_vectors(width=vectors.shape[1])
    for word, vector in zip(words, vectors, strict=True):
        nlp.vocab.set_vector(word, vector)
    nlp.meta["name"] = "trained_on_annotations"
    return nlp


def _listening(nlp: Language, name: str) -> dict[str, object]:
    """Configures a component's default model to use the shared tok2vec instead of its own."""
    model = dict((nlp.get_factory_meta(name).default_config or {})["model"])
    model["tok2vec"] = {"@architectures": "spacy.Tok2VecListener.v1", "width": 96, "upstream": "*"}
    return model


def _example(nlp: Language, sentence: Sentence) -> Example:
    heads = [place if head == 0 else head - 1 for place, head in enumerate(sentence.heads)]
    doc = Doc(nlp.vocab, words=list(sentence.words))
    # Relation labels are not used, so all have the same name.
    reference = Doc(
        nlp.vocab,
        words=list(sentence.words),
        pos=list(sentence.tags),
        heads=heads,
        deps=["ROOT" if place == head else "nmod" for place, head in enumerate(heads)],
    )
    return Example(doc, reference)


def word_vectors(texts: Sequence[Sequence[str]], dimensions: int) -> tuple[list[str], np.ndarray]:
    """Computes word vectors from co-occurrence: a truncated SVD of positive pointwise mutual information (PPMI).

    Levy and Goldberg (2014) show that this approximates what skip-gram learns; it needs no training. Inner products of
    the vectors approximate those of the words' PPMI rows, that is, how much context the words share.

    Args:
        texts: Tokens of each text.
        dimensions: Length of the vectors.

    Returns:
        Words in order of first occurrence, and their vectors, float32 (words, at most ``dimensions``).
    """
    words = list(dict.fromkeys(word.lower() for text in texts for word in text))
    number = {word: place for place, word in enumerate(words)}
    counts = np.zeros((len(words), len(words)))
    for text in texts:
        places = [number[word.lower()] for word in text]
        for here, place in enumerate(places):
            for other in places[max(0, here - WINDOW) : here] + places[here + 1 : here + 1 + WINDOW]:
                counts[place, other] += 1
    total = max(counts.sum(), 1.0)
    expected = np.outer(counts.sum(1), counts.sum(0)) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(counts > 0, np.log(counts / expected), 0).clip(min=0)
    left, values, _ = np.linalg.svd(information)
    kept = min(dimensions, len(words))
    return words, (left[:, :kept] * values[:kept]).astype(np.float32)
