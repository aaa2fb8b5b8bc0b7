"""Models of images and texts against an obvious, slow reading of the re-ranking rule, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.models.image_text import BATCH_SIZE, DEFAULT, ImageText, find_image_text
from milan_ray.models.weights import weights_digest

transformers = pytest.importorskip("transformers")

SIZE, PATCH, GRID = 30, 6, 5  # of tests/plugins/tiny_clip.py
WORDS = ("a", "red", "house", "dogs", "on", "grass", "dark", "areas")

Save = Callable[..., str]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, save_clip: Save) -> ImageText:
    return ImageText(save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory, save_clip: Save) -> ImageText:
    return ImageText(save_clip(tmp_path_factory.mktemp("siglip") / "tiny-siglip", "siglip"))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def masks(size: tuple[int, int]) -> torch.Tensor:
    """Random blobs, a thin line, a corner, nothing, everything, and one of fractions."""
    found = (torch.rand(6, *size, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    found[1], found[2], found[3], found[4] = 0, 0, 0, 1
    found[1, size[0] // 2], found[2, :3, :3] = 1, 1
    found[5] *= 0.3
    return found


def slow_clip(model: Any, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One image, one mask, every head and token in a loop: attention as in the paper, CLS's weights times the mask."""
    vision = model.vision_model
    patches = [
        (vision.embeddings.patch_embedding.weight * pixels[:, y : y + PATCH, x : x + PATCH]).sum((1, 2, 3))
        for y in range(0, SIZE, PATCH)
        for x in range(0, SIZE, PATCH)
    ]
    tokens = torch.stack([vision.embeddings.class_embedding, *patches]) + vision.embeddings.position_embedding.weight
    tokens = vision.pre_layrnorm(tokens)
    shares = F.interpolate(mask[None, None], size=(GRID, GRID), mode="bilinear", align_corners=False).flatten()
    for block in vision.encoder.layers:
        attention, given = block.self_attn, block.layer_norm1(tokens)
        heads = []
        for head in range(attention.num_heads):
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            q, k, v = (p(given)[:, own] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            weights = (q @ k.T * attention.head_dim**-0.5).softmax(dim=1)
            for patch in range(GRID * GRID):
                weights[0, 1 + patch] *= shares[patch]
            heads.append(weights @ v)
        tokens = tokens + attention.out_proj(torch.cat(heads, dim=1))
        tokens = tokens + block.mlp(block.layer_norm2(tokens))
    embedding = model.visual_projection(vision.post_layernorm(tokens[0]))
    return embedding / embedding.norm()


def slow_siglip(model: Any, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One image, one mask: the pooling head's weights times the mask."""
    head = model.vision_model.head
    tokens = model.vision_model(pixel_values=pixels[None]).last_hidden_state[0]
    shares = F.interpolate(mask[None, None], size=(GRID, GRID), mode="bilinear", align_corners=False).flatten()
    pool, width = head.attention, tokens.shape[1]
    q, k, v = (
        given @ pool.in_proj_weight[n * width : (n + 1) * width].T + pool.in_proj_bias[n * width : (n + 1) * width]
        for n, given in enumerate((head.probe[0], tokens, tokens))
    )
    size = width // pool.num_heads
    mixed = []
    for start in range(0, width, size):
        own = slice(start, start + size)
        weights = (q[:, own] @ k[:, own].T * size**-0.5).softmax(dim=1)
        mixed.append((weights * shares) @ v[:, own])
    pooled = pool.out_proj(torch.cat(mixed, dim=1))
    embedding = (pooled + head.mlp(head.layernorm(pooled)))[0]
    return embedding / embedding.norm()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (7, 7), (64, 48), (5, 5), (224, 224)])
def test_parity_regions_equal_the_reference_s_arithmetic(
    kind: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    model: ImageText = request.getfixturevalue(kind)
    slow = slow_clip if kind == "clip" else slow_siglip
    pictures, regions = images(3), masks(size)
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    found = model.pool(model.maps(pictures), regions, index)
    pixels = (pictures - model.mean) / model.std
    with torch.no_grad():
        expected = torch.stack([slow(model.model, pixels[i], mask) for i, mask in zip(index, regions, strict=True)])
    half = found.shape[1] // 2
    torch.testing.assert_close(found[:, :half], expected, atol=1e-5, rtol=0)
    assert (found[:2, :half] - found[:2, half:]).abs().max() > 0.01  # masks do something


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_regions_full_mask_is_the_image_and_empty_mask_says_next_to_nothing_of_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model: ImageText = request.getfixturevalue(kind)
    pictures = images(4)
    maps = model.maps(pictures)
    index = torch.arange(4)
    full = model.pool(maps, torch.ones(4, 9, 11), index)
    half = full.shape[1] // 2
    torch.testing.assert_close(full[:, :half], full[:, half:], atol=1e-5, rtol=0)
    empty = model.pool(maps, torch.zeros(4, 9, 11), index)[:, :half]
    assert empty.isfinite().all()
    spread, of_images = empty.std(dim=0).max(), full[:, :half].std(dim=0).max()
    # Not renormalised: what CLIP's CLS token gives to itself still depends on what it would have given to patches.
    assert spread < (1e-6 if kind == "siglip" else 0.5 * of_images)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_and_texts_are_embedded_as_transformers_does(kind: str, request: pytest.FixtureRequest) -> None:
    model: ImageText = request.getfixturevalue(kind)
    pictures, texts = images(3), ["a red house", "dogs on grass", "areas", "dark " * 30]
    ids = model.tokenizer(texts, padding="max_length", max_length=10, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model.model(input_ids=ids, pixel_values=(pictures - model.mean) / model.std)
    torch.testing.assert_close(model.maps(pictures)[1], F.normalize(output.image_embeds, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_texts(texts), F.normalize(output.text_embeds, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_do_not_depend_on_what_is_embedded_beside_them(kind: str, request: pytest.FixtureRequest) -> None:
    model: ImageText = request.getfixturevalue(kind)
    texts = [f"{word} {other}" for word in WORDS for other in WORDS] + ["a red house on dark grass areas"]
    together = model.embed_texts(texts)
    alone = torch.cat([model.embed_texts([text]) for text in texts])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    assert torch.equal(model.embed_texts(texts), together)
    assert model.embed_texts([]).shape[0] == 0
    many = 2 * BATCH_SIZE + 3
    maps, regions, index = model.maps(images(2)), torch.rand(many, 8, 8), torch.arange(many) % 2
    pooled = model.pool(maps, regions, index)
    torch.testing.assert_close(model.pool(maps, regions[-2:], index[-2:]), pooled[-2:], atol=1e-6, rtol=0)


def test_images_of_other_sizes_are_fitted_and_stay_in_range(clip: ImageText) -> None:
    fitted = clip.fit((torch.rand(2, 3, 64, 48) > 0.5).float())
    assert fitted.shape == (2, 3, SIZE, SIZE) and fitted.min() >= 0 and fitted.max() <= 1
    assert clip.fit(fitted) is fitted


def test_half_precision_files_are_computed_in_single_precision(tmp_path: Path, save_clip: Save) -> None:
    model = ImageText(save_clip(tmp_path / "half", dtype=torch.float16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_identity_follows_weights_and_words(tmp_path: Path, clip: ImageText, save_clip: Save) -> None:
    same = ImageText(save_clip(tmp_path / "same"))
    assert same.identity() == clip.identity() and same.text_identity() == clip.text_identity()
    with torch.no_grad():
        same.model.logit_scale += 1
    assert same.identity()["weights"] == weights_digest(same.model) != clip.identity()["weights"]
    same.tokenizer.add_tokens(["zebra"])
    assert same.text_identity()["tokenizer"] != clip.text_identity()["tokenizer"]


def test_model_is_found_by_folder_or_by_name_in_the_models_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    folder = tmp_path / DEFAULT
    folder.mkdir()
    (folder / "config.json").touch()
    assert find_image_text(DEFAULT) == find_image_text(str(folder)) == str(folder)


def test_missing_model_is_one_sentence_with_place_variable_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    with pytest.raises(MilanError) as error:
        find_image_text(DEFAULT)
    for part in (f"{DEFAULT}/config.json", str(tmp_path), "$MILAN_MODELS_DIR", "hf download openai/", "--clip"):
        assert part in str(error.value)
    with pytest.raises(MilanError, match=rf"config.json is not in {tmp_path}/nowhere: put it there, or name .* --clip"):
        find_image_text(str(tmp_path / "nowhere"))


def test_folder_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MilanError, match=f"{tmp_path} cannot be loaded .* model.safetensors"):
        ImageText(str(tmp_path))
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.save_pretrained(tmp_path / "bert")
    with pytest.raises(MilanError, match="model of type 'bert': give the folder of a CLIP or SigLIP model"):
        ImageText(str(tmp_path / "bert"))


def test_weights_that_are_missing_are_named(tmp_path: Path, save_clip: Save) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(save_clip(tmp_path / "torso")) / "model.safetensors"
    state = load_file(file)
    state.pop("visual_projection.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(MilanError, match=r"lack visual_projection.weight and 0 more"):
        ImageText(str(file.parent))


def test_whole_images_are_embedded_as_if_alone_and_looked_at_as_such_models_do(clip, siglip):
    for model in (clip, siglip):
        some = images(BATCH_SIZE + 3)
        found = model.embed_images(some)
        assert torch.equal(found[-1:], model.embed_images(some[-1:]))
        torch.testing.assert_close(found, model.maps(some)[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(some)))
        assert model.embed_images(some[:0]).shape == (0, model.width)
        with pytest.raises(TypeError, match="not at concept maps"):
            model.embed_maps([None])
    assert (clip.view.resize, clip.view.crop, siglip.view.resize, siglip.view.crop) == (SIZE, SIZE, (SIZE, SIZE), None)
