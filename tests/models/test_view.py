from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from milan_ray.errors import UnreadableImage
from milan_ray.models.view import GENERATED, IMAGENET_MEAN, IMAGENET_STD, MAX_ASPECT, Preprocess, View


@pytest.mark.parametrize("size", [(300, 200), (100, 301), (224, 224)])
def test_preprocess_equals_torchvision_bit_for_bit(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    fingerprint = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    preprocess = Preprocess()
    views = torch.from_numpy(preprocess.view(image)[None].copy())
    assert torch.equal(preprocess(views)[0], fingerprint(image))


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    resize=st.one_of(st.none(), st.integers(1, 64), st.tuples(st.integers(1, 64), st.integers(1, 64))),
    crop=st.integers(1, 64),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
)
def test_view_equals_torchvision_s_resize_and_centre_crop(width, height, resize, crop, interpolation) -> None:
    assume(not isinstance(resize, int) or max(width, height) <= MAX_ASPECT * min(width, height))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = image
    if resize is not None:
        size = list(resize) if isinstance(resize, tuple) else [resize]
        expected = transforms.functional.resize(expected, size, transforms.InterpolationMode(interpolation))
    expected = transforms.functional.center_crop(expected, [crop, crop])
    np.testing.assert_array_equal(View(resize, crop, interpolation)(image), np.asarray(expected))


def test_view_elongated_image_is_unreadable_rather_than_enormous() -> None:
    with pytest.raises(UnreadableImage, match="1×20000 pixels"):
        View()(Image.new("RGB", (1, 20000)))


def test_view_squashing_resize_takes_any_aspect() -> None:
    assert View(resize=(32, 48), crop=None)(Image.new("RGB", (1, 2000))).shape == (32, 48, 3)


def test_truncation_quirk_loses_at_most_one_and_rounding_nothing() -> None:
    views = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    preprocess = Preprocess()
    np.testing.assert_array_equal(preprocess.pixels(preprocess(torch.from_numpy(views))).numpy(), views)
    lost = views.astype(int) - preprocess.truncated(views)
    assert set(np.unique(lost)) == {0, 1}
    # The reference's arithmetic by hand: float32 x·mul + add, cut off.
    x = preprocess(torch.from_numpy(views[:1, :1, :1])).flatten().numpy()
    by_hand = x * np.float32(np.array(preprocess.std) * 255) + np.float32(np.array(preprocess.mean) * 255)
    np.testing.assert_allclose(preprocess.truncated(views)[0, 0, 0], by_hand.clip(0, 255).astype(np.uint8), atol=0)


def test_generated_images_of_minus_one_to_one_become_bytes() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert GENERATED.pixels(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert GENERATED.pixels(values, truncate=True)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
