import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from milan_ray.captioner import encoder as encoders
from milan_ray.captioner.encoder import (
    EncoderSpec,
    MaskedExemplars,
    PyramidEncoder,
    encode_exemplars,
    get_encoder,
    level_weights,
    pool_maps,
    register_encoder,
)
from milan_ray.errors import MilanError
from milan_ray.models.weights import WeightsFile


def backbone() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten()
    )


@pytest.fixture
def encoder() -> PyramidEncoder:
    return EncoderSpec("small", lambda _: backbone(), ("0", "2"), size=17).load()


def test_pool_maps_shared_images_equals_one_pass_per_exemplar(encoder: PyramidEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 17, 17, generator=generator)
    masks = (torch.rand(9, 17, 17, generator=generator) > 0.6).float()
    masks[3] = 0
    index = torch.tensor([3, 0, 0, 2, 3, 3, 0, 2, 0])  # image 1 has no mask
    pooled = pool_maps(encoder.maps(images), masks, index)
    torch.testing.assert_close(pool_maps(encoder.maps(images), masks, index, skip=False), pooled, atol=1e-6, rtol=0)
    assert pooled.shape == (9, encoder.feature_size) == (9, 10)
    for row, (mask, image) in enumerate(zip(masks, index, strict=True)):
        naive = []
        for level in encoder.maps(images[image][None]):
            small = F.interpolate(mask[None, None], level.shape[2:], mode="bilinear", align_corners=False)
            small = small / small.sum() if small.any() else small
            naive.append((level * small).sum((2, 3))[0])
        assert torch.allclose(pooled[row], torch.cat(naive), atol=1e-6)
    assert not pooled[3].any()


@pytest.mark.parametrize("shape", [(224, 224), (32, 96), (20, 20)])
@pytest.mark.parametrize("size", [(112, 112), (56, 28), (7, 7), (16, 48), (10, 10), (13, 13), (55, 55)])
def test_level_weights_of_bool_masks_are_those_of_float_masks_to_the_bit(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    masks = torch.rand(9, *shape, generator=torch.Generator().manual_seed(0)) > 0.8
    masks[0] = False
    assert torch.equal(level_weights(masks, size), level_weights(masks.float(), size))
    assert level_weights(masks, size, torch.float64).dtype == torch.float64


def test_pool_maps_a_mask_s_last_bits_do_not_depend_on_other_masks(encoder: PyramidEncoder) -> None:
    """Which masks are pooled together depends on what a job still has to do."""
    random = torch.Generator().manual_seed(0)
    maps = encoder.maps(torch.rand(3, 3, 16, 16, generator=random))
    maps += [torch.randn(3, 64, 40, 40, generator=random)]  # wide enough for other kernels of matrix products
    masks = torch.rand(50, 17, 17, generator=random) > 0.7
    index = torch.randint(0, 3, (50,), generator=random)
    together = {skip: pool_maps(maps, masks, index, skip) for skip in (True, False)}
    for size in (1, 2, 7, 49):
        some = torch.randperm(50, generator=random)[:size]
        for skip, whole in together.items():
            assert torch.equal(pool_maps(maps, masks[some], index[some], skip), whole[some])
    maps[0][0, 0, 0, 0] = torch.inf  # what no mask covers counts for none
    masks[:, :5, :5] = False
    assert torch.isfinite(pool_maps(maps, masks, index, skip=False)).all()


def test_encode_exemplars_more_masks_than_one_pass_takes_are_each_pooled(encoder, monkeypatch) -> None:
    monkeypatch.setattr(encoders, "MASKS", 4)
    random = torch.Generator().manual_seed(0)
    images, masks = torch.rand(3, 3, 17, 17, generator=random), torch.rand(11, 17, 17, generator=random) > 0.6
    of_image = np.array([0, 0, 2, 0, 0, 0, 0, 0, -1, 0, 2])  # nine of the first image, none of one exemplar
    group = MaskedExemplars(of_image, lambda places: masks[torch.from_numpy(places)])
    (features,) = encode_exemplars(encoder, [group], lambda start, stop: encoder.maps(images[start:stop]), 3, 2)
    for found, mask, image in zip(features, masks, of_image, strict=True):
        alone = pool_maps(encoder.maps(images[[image]]), mask[None], torch.zeros(1, dtype=torch.int64))[0]
        np.testing.assert_allclose(found, alone.numpy() if image >= 0 else np.zeros_like(found), atol=1e-6)


def test_fit_resizes_images_of_another_size_and_no_others(encoder: PyramidEncoder) -> None:
    images = torch.rand(2, 3, 34, 51, generator=torch.Generator().manual_seed(0))
    assert encoder.fit(images).shape == (2, 3, 17, 17)
    flat = torch.full((1, 3, 34, 51), 0.25)
    torch.testing.assert_close(encoder.fit(flat), torch.full((1, 3, 17, 17), 0.25))
    own = images[..., :17, :17]
    assert encoder.fit(own) is own


def test_pool_maps_no_mask_at_all_is_empty(encoder: PyramidEncoder) -> None:
    maps = encoder.maps(torch.rand(1, 3, 17, 17))
    for skip in (True, False):
        assert pool_maps(maps, torch.zeros(0, 17, 17), torch.zeros(0, dtype=torch.long), skip).shape == (0, 10)


def test_encoder_in_place_relu_is_seen_as_the_reference_sees_it(encoder: PyramidEncoder) -> None:
    first, second = encoder.maps(torch.rand(2, 3, 17, 17))
    assert first.min() == 0
    assert second.min() < 0


def test_encoder_hooks_are_released_even_after_an_error(encoder: PyramidEncoder) -> None:
    encoder.maps(torch.rand(1, 3, 17, 17))
    with pytest.raises(RuntimeError):
        encoder.maps(torch.rand(1, 3, 1, 1))
    assert not any(module._forward_hooks for module in encoder.modules())


def test_encoder_features_can_train_a_decoder(encoder: PyramidEncoder) -> None:
    layer = nn.Linear(encoder.feature_size, 1)
    layer(encoder(torch.rand(2, 3, 17, 17))).sum().backward()
    assert layer.weight.grad is not None


def test_registered_encoder_is_found_and_an_unknown_one_names_the_nearest(encoder: PyramidEncoder) -> None:
    spec = register_encoder("test-small", lambda _: backbone(), ["0"], size=17)
    assert get_encoder("test-small") is spec
    with pytest.raises(MilanError, match=r"unknown encoder 'resnet10'.*resnet101"):
        get_encoder("resnet10")


def test_encoder_weights_missing_says_file_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        MilanError,
        match=r"resnet18-\w+\.pth is neither in .* nor in .*: fetch it from https://download.pytorch.org/models/resnet18",
    ):
        get_encoder("resnet18").load()


def test_encoder_weights_from_file_and_hub_cache_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.alexnet(weights=None).state_dict()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(state, cache / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    loaded = get_encoder("alexnet").load()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.backbone.state_dict().items())
    del state["features.0.weight"]
    with pytest.raises(MilanError, match=r"1 missing \(first: features\.0\.weight\)"):
        get_encoder("alexnet").load(state)


@pytest.mark.parametrize(("name", "channels"), [("alexnet", 1152), ("resnet50", 3904)])
def test_encoder_of_torchvision_equals_hooks_on_the_whole_classifier(name: str, channels: int) -> None:
    torch.manual_seed(0)
    classifier = torchvision.models.get_model(name, weights=None).eval()
    spec = get_encoder(name)
    outputs: dict[str, torch.Tensor] = {}
    for layer in spec.layers:
        classifier.get_submodule(layer).register_forward_hook(
            lambda _m, _i, out, layer=layer: outputs.update({layer: out})
        )
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classifier((images - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1))
    expected = torch.cat([level.mean((2, 3)) for level in outputs.values()], dim=1)
    ours = spec.load(classifier.state_dict())(images)
    assert ours.shape == (2, channels)
    scale = expected.abs().max().clamp(min=1)
    assert torch.allclose(ours / scale, expected / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "resnet50", "resnet101"])
def test_encoder_published_weights_are_torchvision_s_first(name: str) -> None:
    published = get_encoder(name).published
    assert published is not None
    assert published.url == torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url


def test_encoder_published_weights_are_fetched_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCH_HOME", "MILAN_MODELS_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "models"))
    torch.manual_seed(3)
    torch.save(backbone().state_dict(), tmp_path / "small.pth")

    def build(path: str | None) -> nn.Module:
        model = backbone()
        if path is not None:
            model.load_state_dict(torch.load(path, weights_only=True))
        return model

    spec = EncoderSpec("small", build, ("0",), size=17, published=WeightsFile.at((tmp_path / "small.pth").as_uri()))
    with pytest.raises(MilanError, match=r"small\.pth .*: fetch it .* let --download do so, or .* --encoder-weights"):
        spec.load()
    spec.load(backbone().state_dict())  # a captioner's own weights need no file
    loaded = spec.load(download=True)
    assert (tmp_path / "models/small.pth").is_file()
    assert all(
        torch.equal(tensor, spec.load().backbone.state_dict()[name])
        for name, tensor in loaded.backbone.state_dict().items()
    )


def test_encoder_of_the_documents_is_a_pyramid_of_efficientnet_lite0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_ENCODERS", dict(encoders._ENCODERS))
    page = (Path(__file__).resolve().parents[2] / "docs/photographs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# lite0\.py\n.*?)```", page, re.DOTALL)
    exec(compile(block, "lite0.py", "exec"), {})
    spec = get_encoder("lite0")
    built = PyramidEncoder(spec, spec.factory("random"))
    assert built.feature_size == 16 + 24 + 40 + 112 + 320 + 1280
