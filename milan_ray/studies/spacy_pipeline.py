"""The spaCy pipeline that reads descriptions: the user's, an installed one, or one trained on the world's sentences."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import spacy
from spacy.language import Language

from milan_ray.progress import say
from milan_ray.scoring.language_pipeline import Sentence, train_language
from milan_ray.studies.annotators.statistics import load_spacy_pipeline
from milan_ray.world.annotators import specimens
from milan_ray.world.plugin import weights_dir

INSTALLED = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm")
"""Published pipelines that are used where they are installed, the reference's first."""

SPECIMENS = 3000
VERSION = "language-1"
OF_THE_WORLD = f"a small pipeline trained on the built-in world's sentences ({VERSION}), which knows no others"


def find_spacy_pipeline(name: str | None = None) -> tuple[Language, str]:
    """Finds the pipeline.

    Args:
        name: An installed pipeline, or the directory of one; None takes the first of :data:`INSTALLED` that is there,
            else one that is trained in seconds on sentences of the world's annotators and kept next to its networks.

    Returns:
        The pipeline, and what it is called in outputs, which say how far to trust it.

    Raises:
        MilanError: There is no such pipeline.
    """
    name = name or _installed()
    if name is None:
        return _of_the_world(), OF_THE_WORLD
    nlp = load_spacy_pipeline(name)
    return nlp, f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}"


def language_name(name: str | None = None) -> str:
    """Name of the pipeline that :func:`find_spacy_pipeline` returns, without training one."""
    name = name or _installed()
    return OF_THE_WORLD if name is None else find_spacy_pipeline(name)[1]


def _installed() -> str | None:
    return next((name for name in INSTALLED if spacy.util.is_package(name)), None)


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
