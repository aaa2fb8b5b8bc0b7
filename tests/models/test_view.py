from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from milan_ray.errors import UnreadableImage
from milan_ray.models.view import IMAGENET_MEAN, IMAGENET_STD, Preprocess, View


@pytest.mark.parametrize("size", [(300, 200), (100, 301), (224, 224)])
def test_preprocess_equals_torchvision_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    recipe = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    preprocess = Preprocess()
    views = torch.from_numpy(preprocess.view(image)[None].copy())
    assert torch.equal(preprocess(views)[0], recipe(image))


def test_view_elongated_image_is_unreadable_rather_than_enormous() -> None:
    with pytest.raises(UnreadableImage, match="1×20000 pixels"):
        View()(Image.new("RGB", (1, 20000)))


def test_view_squashing_resize_takes_any_aspect() -> None:
    assert View(resize=(32, 48), crop=None)(Image.new("RGB", (1, 2000))).shape == (32, 48, 3)
