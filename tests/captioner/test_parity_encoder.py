import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.encoder import PyramidEncoder, SpatialEncoder, get_encoder, level_weights


@pytest.fixture(scope="module")
def inputs(golden: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(golden / "encoder/inputs.npz") as file:
        images = torch.from_numpy(file["images"]).float() * torch.tensor(1 / 255)
        masks = torch.from_numpy(np.unpackbits(file["masks"], axis=-1)[:, 0]).float()
    return images, masks


@pytest.fixture(scope="module")
def features(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "encoder/features.npz") as file:
        return dict(file)


def seeded(name: str) -> PyramidEncoder:
    torch.manual_seed(0)
    return get_encoder(name).load(torchvision.models.get_model(name, weights=None).state_dict())


def assert_close(ours: torch.Tensor, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-4, atol=1e-4)


def assert_levels_close(ours: torch.Tensor, reference: np.ndarray, channels: list[int]) -> None:
    """Within 1e-4, relative to each level's scale: random deep networks reach 1e5, and sums of such numbers cancel."""
    ends = np.cumsum(channels)[:-1]
    for level, expected in zip(np.split(ours.numpy(), ends, axis=1), np.split(reference, ends, axis=1), strict=True):
        np.testing.assert_allclose(level, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max() / 100))


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "resnet50", "resnet101"])
def test_encoder_golden_layers_sizes_and_seeded_weights_are_the_references(golden: Path, name: str) -> None:
    meta = json.loads((golden / "encoder/meta.json").read_text())[name]
    torch.manual_seed(0)
    encoder = get_encoder(name).load(state := torchvision.models.get_model(name, weights=None).state_dict())
    digest = hashlib.sha256()
    for key, tensor in {"mean": encoder.mean, "std": encoder.std}.items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    for key, tensor in state.items():
        digest.update(f"encoder.model.{key}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == meta["state_dict_sha256"]
    assert list(encoder.spec.layers) == meta["layers"]
    assert [encoder.feature_size] == meta["feature_shape"]


@pytest.mark.parametrize("name", ["alexnet", "resnet50"])  # the golden folder holds no features of these
def test_encoder_golden_inputs_features_equal_the_reference_formula(golden: Path, inputs: tuple, name: str) -> None:
    images, masks = (array[[0, 5, 6]] for array in inputs)
    encoder, expected = seeded(name), []
    for level in encoder.maps(images):
        weights = F.interpolate(masks[:, None], level.shape[-2:], mode="bilinear", align_corners=False)
        seen = ~weights.isclose(torch.zeros(())).flatten(1).all(1)
        weights[seen] /= weights[seen].sum((-1, -2), keepdim=True)
        expected.append((level * weights).sum((-1, -2)))
    ours = encoder(images, masks)
    assert_levels_close(ours, torch.cat(expected, dim=1).numpy(), [level.shape[1] for level in expected])
    column = json.loads((golden / "encoder/meta.json").read_text())[name]["image6_zero_from_column"]
    assert not ours[1].any()
    assert ours[2, :column].any() and not ours[2, column:].any()


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_encoder_golden_features_agree(inputs: tuple, features: dict, name: str) -> None:
    images, masks = inputs
    encoder = seeded(name)
    channels = [level.shape[1] for level in encoder.maps(images[:1, :, :64, :64])]
    for key, ours in (
        ("masked", encoder(images, masks)),
        ("nomask", encoder(images[:2])),
        ("single", encoder(images[:1], masks[:1])),
        ("unnormalized", encoder(images[:2], masks[:2], normalize=False)),
    ):
        assert_levels_close(ours, features[f"{name}_{key}"], channels)


def test_encoder_golden_empty_and_vanished_masks_zero_where_the_reference_is(
    golden: Path, inputs: tuple, features: dict
) -> None:
    images, masks = inputs
    ours = seeded("resnet18")(images, masks)
    column = json.loads((golden / "encoder/meta.json").read_text())["resnet18"]["image6_zero_from_column"]
    assert not ours[5].any()
    assert ours[6, :column].any() and not ours[6, column:].any()


@pytest.mark.parametrize("size", [112, 56, 28, 14, 7])
def test_level_weights_golden_masks_are_normalised_interpolations(inputs: tuple, features: dict, size: int) -> None:
    raw = torch.from_numpy(features[f"ms_{size}"])
    total = raw.sum(dim=(1, 2), keepdim=True)
    assert_close(level_weights(inputs[1], (size, size)), (raw / total.masked_fill(total == 0, 1)).numpy())


def test_spatial_encoder_golden_features_agree(inputs: tuple, features: dict) -> None:
    images, masks = inputs
    encoder = SpatialEncoder(seeded("resnet18"))
    assert_close(encoder(images[:2], masks[:2]), features["spatial_resnet18"])
    assert_close(encoder(images[:2]), features["spatial_resnet18_nomask"])


def test_encoder_from_golden_checkpoint_needs_no_download(toy: Captioner, inputs: tuple, features: dict) -> None:
    images, masks = inputs
    encoder = get_encoder(toy.encoder_name).load(toy.encoder_state)
    assert_close(encoder(images[:1], masks[:1]), features["resnet18_single"])


def test_seeded_resnet18_is_the_reference_backbone(golden: Path, toy: Captioner) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    assert toy.encoder_state is not None
    assert all(torch.equal(tensor, toy.encoder_state[name]) for name, tensor in model.state_dict().items())
