"""Captions in a classifier's words, against the classifier asked an image at a time."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from milan_ray.engine.references import load
from milan_ray.errors import MilanError
from milan_ray.models import class_captions
from milan_ray.models.class_captions import MOST, NAME, SHARE
from milan_ray.models.efficientnet_lite import BATCH, CLASSES, PACKAGE, build
from milan_ray.models.folders import packaged_folder
from milan_ray.models.image_captions import ImageCaptionerRef

installed = pytest.mark.skipif(packaged_folder(PACKAGE) is None, reason="needs pip install 'milan-ray[photos]'")


@installed
def test_caption_names_the_likeliest_classes_of_an_image_alone(monkeypatch) -> None:
    captioner, network = load(ImageCaptionerRef(NAME)), build(None).eval()
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (BATCH + 1, 1, 1, 3), np.uint8) * np.ones((1, 224, 224, 1), np.uint8))
    captions = captioner.caption(images)
    assert captioner.caption([]) == []
    for place in (0, 5, BATCH):
        with torch.no_grad():
            pixels = torch.from_numpy(images[place]).permute(2, 0, 1)[None] / 255
            shares = network((pixels - 0.5) / 0.5)[0].softmax(dim=0)
        likely = [at for at in shares.argsort(descending=True)[:MOST] if shares[at] >= SHARE * shares.max()]
        assert captions[place] == " or ".join(CLASSES[at] for at in likely)
    assert len(set(captions)) > 1
    before = captioner.identity()
    monkeypatch.setattr(class_captions, "MOST", 1)
    assert [text.split(" or ")[0] for text in captions] == captioner.caption(images)
    assert captioner.identity() != before


def test_missing_package_is_one_sentence_with_the_line_for_pip(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # Python's own mark of a module that is not there
    with pytest.raises(MilanError, match=r"which is not installed: `pip install 'milan-ray\[photos\]'`"):
        load(ImageCaptionerRef(NAME))
