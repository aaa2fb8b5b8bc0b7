"""The spaCy pipeline that reads descriptions: the user's, an installed one, or one trained on the world's sentences."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import spacy
from spacy.language import Language

from milan_ray.experiments.annotation_statistics import load_language
from milan_ray.experiments.language_pipeline import Sentence, train_language
from milan_ray.progress import say
from milan_ray.world.annotators import specimens
from milan_ray.world.plugin import weights_dir

INSTALLED = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""Published pipelines that are used where they are installed, the reference's first."""

SPECIMENS = 3000
VERSION = "language-1"


def find_language(name: str | None = None) -> tuple[Language, str]:
    """Finds the pipeline.

    Args:
        name: An installed pipeline, or the directory of one; None takes the first of :data:`INSTALLED` that is there,
            else one that is trained in seconds on sentences of the world's annotators and kept beside its networks.

    Returns:
        The pipeline, and what it is called in outputs, which say how far to trust it.

    Raises:
        MilanError: There is no such pipeline.
    """
    if name is not None:
        nlp = load_language(name)
        return nlp, f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}"
    for installed in INSTALLED:
        if spacy.util.is_package(installed):
            return find_language(installed)
    return (
        _of_the_world(),
        f"a small pipeline trained on the built-in world's sentences ({VERSION}), which knows no others",
    )


def _of_the_world() -> Language:
    folder = Path(weights_dir(), VERSION)
    if not (folder / "meta.json").is_file():
        say("training a small spaCy pipeline on the world's sentences; --language takes a better one")
        sentences = [Sentence(each.tokens, each.tags, each.heads) for each in specimens(SPECIMENS)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=folder.parent, prefix=f".{VERSION}-")
        train_language(sentences).to_disk(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not folder.exists():  # else another job was first, with the same
                raise
    return spacy.load(folder)
