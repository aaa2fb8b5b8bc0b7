"""The world's image-text model: a small CLIP, trained on rendered scenes and phrases that describe them.

Like CLIP, it is trained on whole images and their captions, and never on masks, units or annotations of units. It is
saved in the format of transformers and loaded like any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray.models.folders import import_transformers
from milan_ray.models.image_text import CONCEPTS_FILE
from milan_ray.world.lexicon import CONCEPT, CONCEPTS, NAMES, names_of, plural
from milan_ray.world.networks import CLASSES, MEAN, STD
from milan_ray.world.scenes import SIDE
from milan_ray.world.training import (
    PREPROCESS,
    TESTS,
    Recipe,
    Trained,
    TrainTask,
    attributes_of,
    fit,
    images_of,
    labels_of,
    reproducible,
)

FOLDER = "clip"
"""Name of the model's folder, alongside the world's other weights."""

RECIPE = Recipe(scenes=5_000, epochs=5, lr=2e-3, first=120_000, batch_size=32)
"""Default training recipe; takes about 100 s on one core."""

LENGTH = 16
"""Maximum number of tokens in a text, including begin and end tokens."""

_STUFF = ("areas", "surfaces", "regions", "patterns", "things", "shapes", "objects", "edges", "lines")
_FILLER = ("the", "a", "of", "on", "and", "in", "with", "word", "dark", "bright", "random", "different", "various")
_BEGIN, _END, _PAD, _UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"

_LOOKS = names_of("colour", "texture")
_RELATIONS = names_of("relation")


def phrase(concepts: Sequence[str], draw: Callable[[], float]) -> str:
    """Generates a phrase that names concepts of an image: "red houses and roofs", "striped areas", "dusk".

    Args:
        concepts: One or more concept names.
        draw: Returns uniform random numbers in [0, 1).
    """

    def term(name: str) -> str:
        known = CONCEPT[name]
        chosen = known.synonyms[int(draw() * len(known.synonyms))]
        return plural(chosen) if known.kind not in ("colour", "texture", "relation") and draw() < 0.6 else chosen

    looks = [term(name) for name in concepts if name in _LOOKS]
    relations = [term(name) for name in concepts if name in _RELATIONS]
    nouns = [term(name) for name in concepts if name not in (*_LOOKS, *_RELATIONS)]
    joint = (" and ", " of ", " on ", " ")[int(draw() * 4)]
    if relations:
        return " ".join([*looks, "things", *relations, joint.join(nouns)]).strip()
    if not nouns and draw() < 0.5:
        nouns = [_STUFF[int(draw() * len(_STUFF))]]
    return " ".join([" and ".join(looks) if draw() < 0.5 else " ".join(looks), joint.join(nouns)]).strip()


def captions(labels: Sequence[int], shown: Tensor, draw: Callable[[], float]) -> tuple[list[str], Tensor]:
    """Generates one caption per scene, usually of its big object, alone or with up to two more concepts.

    Args:
        labels: Classes of B scenes, as indices into ``CLASSES``.
        shown: Visible concepts of each scene, (B, C), columns as ``NAMES``.
        draw: Returns uniform random numbers in [0, 1).

    Returns:
        B captions, and the concepts that each caption names, (B, C).
    """
    texts, named = [], torch.zeros(len(labels), len(NAMES))
    for row, (label, present) in enumerate(zip(labels, shown.tolist(), strict=True)):
        others = [name for name, there in zip(NAMES, present, strict=True) if there and name != CLASSES[label]]
        chosen = [CLASSES[label]] if draw() < 0.7 else []
        for _ in range(int(draw() * 3) if chosen else 1 + int(draw() * 2)):
            chosen.append(others.pop(int(draw() * len(others))))
        named[row, [NAMES.index(name) for name in chosen]] = 1
        texts.append(phrase(chosen, draw))
    return texts, named


def vocabulary() -> list[str]:
    """The tokenizer's vocabulary: special tokens, all words of the world, and the other words of phrases."""
    words = {word for concept in CONCEPTS for term in concept.synonyms for word in f"{term} {plural(term)}".split()}
    return [_PAD, _BEGIN, _END, _UNKNOWN, *sorted(words.union(_STUFF, _FILLER))]


def build(folder: Path) -> None:
    """Writes the files without learned weights to a folder: configuration, tokenizer, image processor, concept list."""
    transformers = import_transformers("the world's model of images and texts comes")
    folder.mkdir(parents=True, exist_ok=True)
    _config(transformers).save_pretrained(folder)
    _tokenizer(transformers).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    words = [CONCEPT[name].synonyms[0] for name in NAMES]
    (folder / CONCEPTS_FILE).write_text("\n".join(words) + "\n", encoding="utf-8")


def _config(transformers: Any) -> Any:
    words = vocabulary()
    ids = {"pad_token_id": words.index(_PAD), "bos_token_id": words.index(_BEGIN), "eos_token_id": words.index(_END)}
    size = {"num_attention_heads": 4, "projection_dim": 64}
    return transformers.CLIPConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "max_position_embeddings": LENGTH, **ids, **size,
        },
        vision_config={
            "image_size": SIDE, "patch_size": 8, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
            **size,
        },
        projection_dim=64,
        architectures=["CLIPModel"],
    )  # fmt: skip


def _tokenizer(transformers: Any) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: number for number, word in enumerate(vocabulary())}
    rules = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, ids[word]) for word in (_BEGIN, _END)]
    rules.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A {_END}", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token=_BEGIN, eos_token=_END, pad_token=_PAD, unk_token=_UNKNOWN,
        model_max_length=LENGTH,
    )  # fmt: skip


def contrastive_loss(similar: Tensor, fits: Tensor) -> Tensor:
    """CLIP's contrastive loss, extended to several matching texts per image and several matching images per text.

    Args:
        similar: Logits of images (B) and texts (T), (B, T).
        fits: 1 where a text is true of an image, else 0, (B, T); every row and column has a 1.
    """
    of_images = (F.log_softmax(similar, dim=1) * fits).sum(dim=1) / fits.sum(dim=1)
    of_texts = (F.log_softmax(similar, dim=0) * fits).sum(dim=0) / fits.sum(dim=0)
    return -of_images.mean() - of_texts.mean()


@torch.no_grad()
def ranking(similar: Tensor, shown: Tensor) -> dict[str, float]:
    """How often a visible concept is more similar to an image than an absent concept of the same kind.

    Args:
        similar: Similarities of images (N) and concepts (C), (N, C), columns as ``NAMES``.
        shown: Visible concepts of each image, (N, C).

    Returns:
        Kind of concept → fraction of triples (image, visible, absent) in the right order; chance is 0.5.
    """
    shares = {}
    for kind in dict.fromkeys(concept.kind for concept in CONCEPTS):
        kinds = ("object", "face") if kind in ("object", "face") else (kind,)
        columns = [number for number, concept in enumerate(CONCEPTS) if concept.kind in kinds]
        scores, there = similar[:, columns], shown[:, columns].bool()
        pairs = there[:, :, None] & ~there[:, None, :]
        shares[kind] = (scores[:, :, None] > scores[:, None, :])[pairs].float().mean().item()
    return shares


def _loss(tokenizer: Any, draw: Callable[[], float], network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of a contrastive loss over captions, a retrieval loss over single concepts, and a classification loss.

    The second loss finds the matching images of one phrase per concept. It trains every concept of a batch at each
    step, because a batch has too few captions of rare concepts.
    """
    model: Any = network
    labels, shown = targets[:, 0].long().tolist(), targets[:, 1:]
    texts, named = captions(labels, shown, draw)
    texts += [phrase([name], draw) for name in NAMES]
    named = torch.cat([named, torch.eye(len(NAMES))])
    images = F.normalize(model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output), dim=1)
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    phrases = F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=1)
    similar = images @ phrases.T * model.logit_scale.exp().clamp(max=100)
    fits = (named @ shown.T == named.sum(dim=1, keepdim=True)).float().T
    count = len(labels)
    some = count + fits[:, count:].any(dim=0).nonzero().flatten()  # concepts visible in at least one image of the batch
    words = -(F.log_softmax(similar[:, some], dim=0) * fits[:, some]).sum(dim=0) / fits[:, some].sum(dim=0)
    objects = [count + NAMES.index(name) for name in CLASSES]
    return (
        contrastive_loss(similar[:, :count], fits[:, :count])
        + words.mean()
        + F.cross_entropy(similar[:, objects], torch.tensor(labels))
    )


def train_image_text(seed: int = 500, threads: int = 1, recipe: Recipe | None = None) -> Trained:
    """Trains the image-text model on scenes and captions.

    Returns:
        Weights, and metrics on held-out scenes: the result of :func:`ranking` by kind of concept, and its mean over the
        kinds as ``accuracy``.
    """
    transformers = import_transformers("the world's model of images and texts comes")
    recipe = recipe or RECIPE
    with reproducible(seed, threads):
        network, tokenizer = transformers.CLIPModel(_config(transformers)), _tokenizer(transformers)
        for module in network.vision_model.modules():
            if isinstance(module, nn.Linear):  # CLIP's small initial weights train so small a tower far more slowly
                nn.init.xavier_uniform_(module.weight)
        targets = torch.cat([labels_of(*recipe.span)[:, None].float(), attributes_of(*recipe.span)], dim=1)
        fit(network, images_of(*recipe.span), targets, partial(_loss, tokenizer, Random(seed).random), recipe)
        words = [CONCEPT[name].synonyms[0] for name in NAMES]
        with torch.no_grad():
            ids = tokenizer(words, padding=True, return_tensors="pt")["input_ids"]
            named = F.normalize(network.text_projection(network.text_model(input_ids=ids).pooler_output), dim=1)
            pooled = [
                network.vision_model(pixel_values=PREPROCESS(batch)).pooler_output
                for batch in images_of(*TESTS).split(250)
            ]
            images = F.normalize(network.visual_projection(torch.cat(pooled)), dim=1)
        metrics = ranking(images @ named.T, attributes_of(*TESTS))
    return network.state_dict(), {"accuracy": sum(metrics.values()) / len(metrics), **metrics}


def image_text_task(threads: int = 1) -> TrainTask:
    """The training task of the image-text model, which is needed only for re-ranking."""
    return TrainTask(f"{FOLDER}/model", partial(train_image_text, threads=threads), 120)
