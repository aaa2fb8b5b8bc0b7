"""Vision models of transformers, small and untrained, saved as anybody's would be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from milan_ray.errors import MilanError
from milan_ray.models.describe import layer_table
from milan_ray.models.establish import establish
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import RANDOM, get_model
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import weights_digest
from milan_ray.plugins import load_plugins

transformers = pytest.importorskip("transformers")
load_plugins()

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUASHED = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}


def save(folder: Path, model: Any, kind: str, **processor: object) -> str:
    """Saves a model with its image processor; returns its name here."""
    model.save_pretrained(folder)
    getattr(transformers, kind)(**processor).save_pretrained(folder)
    return f"hf/{folder}"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT with a CLS token."""
    config = transformers.ViTConfig(**SMALL, intermediate_size=24, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("hf") / "vit"
    return save(folder, transformers.ViTModel(config), "ViTImageProcessor", **SQUASHED)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DINOv2 with four registers, whose nine tokens would also make a square without dropping any."""
    config = transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, image_size=28, patch_size=14)
    folder = tmp_path_factory.mktemp("hf") / "dinov2"
    return save(folder, transformers.Dinov2WithRegistersModel(config), "BitImageProcessor", **CROPPED)


def test_transformers_vit_is_dissected_at_the_hidden_units_of_its_mlps(vit: str) -> None:
    spec = resolve_model(vit)
    assert len(spec.layers) == 2 and spec.prefix_tokens == 1
    assert (spec.preprocess.view.key, spec.preprocess.mean) == ("r32x32-c0-bilinear-32x32", (0.5, 0.4, 0.3))
    model, views = spec.load(), torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with LayerTap(model, spec.layers) as tap, torch.inference_mode():
        outputs = tap(spec.prepare(views))
        expected = model(pixel_values=spec.preprocess(views)).last_hidden_state
    with LayerTap(model, ["outputs"]) as tap, torch.inference_mode():
        torch.testing.assert_close(tap(spec.prepare(views))["outputs"], expected, rtol=0, atol=0)
    layouts = establish(spec, model, spec.layers)
    assert [layouts[layer].maps(output).shape for layer, output in outputs.items()] == [(3, 24, 4, 4)] * 2


def test_transformers_weights_are_the_saved_ones_or_random(vit: str) -> None:
    saved, random = (weights_digest(resolve_model(vit, weights).load()) for weights in (None, RANDOM))
    assert saved == weights_digest(get_model(vit).load()) != random
    file = str(Path(vit.removeprefix("hf/"), "model.safetensors"))
    assert weights_digest(resolve_model(vit, file).load()) == saved


def test_transformers_weights_below_a_prefix_are_those_of_the_network(vit: str, tmp_path: Path) -> None:
    model = resolve_model(vit).load()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if "pooler" not in name}
    prefixed = {f"model.vit.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": prefixed | {"model.classifier.weight": torch.ones(2, 16)}}, tmp_path / "w.ckpt")
    loaded = resolve_model(vit, str(tmp_path / "w.ckpt")).load().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    two = prefixed | {f"ema.{name}": tensor * 2 for name, tensor in prefixed.items()}
    torch.save(two, tmp_path / "two.ckpt")
    with pytest.raises(MilanError, match=r"several networks, model\.vit, ema\.model\.vit"):
        resolve_model(vit, str(tmp_path / "two.ckpt")).load()


def test_transformers_register_tokens_are_dropped(dinov2: str) -> None:
    spec = resolve_model(dinov2)
    assert spec.prefix_tokens == 5
    assert spec.preprocess.view.key == "r36-c28f-bicubic-28x28"
    model: Any = spec.load()
    embeddings: list[torch.Tensor] = []
    handle = model.embeddings.register_forward_hook(lambda module, args, output: embeddings.append(output))
    prepared = spec.prepare(torch.zeros(1, 28, 28, 3, dtype=torch.uint8))
    assert isinstance(prepared, Mapping)
    model(**prepared)
    handle.remove()
    maps = establish(spec, model, ["embeddings"])["embeddings"].maps(embeddings[0])
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), embeddings[0][:, 5:], rtol=0, atol=0)


def test_transformers_layer_table_lists_tokens_and_maps(dinov2: str) -> None:
    table = {info.path: info for info in layer_table(get_model(dinov2))}
    assert [path for path, info in table.items() if info.default] == list(get_model(dinov2).layers)
    assert table["embeddings.patch_embeddings.projection"].units == 16


def test_transformers_image_tower_of_a_model_with_text_is_taken(tmp_path: Path) -> None:
    tower = {**SMALL, "intermediate_size": 24}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 9, "max_position_embeddings": 5, "eos_token_id": 2},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    spec = resolve_model(save(tmp_path / "clip", transformers.CLIPModel(config), "CLIPImageProcessor", **CROPPED))
    assert spec.prefix_tokens == 1
    with LayerTap(spec.load(), spec.layers) as tap, torch.inference_mode():
        outputs = tap(spec.prepare(torch.zeros(1, 28, 28, 3, dtype=torch.uint8)))
    layouts = establish(spec, spec.load(), spec.layers)
    assert [layouts[layer].maps(output).shape for layer, output in outputs.items()] == [(1, 24, 2, 2)] * 2


def test_transformers_convolutional_model_is_dissected_at_its_stages(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    name = save(
        tmp_path / "net", transformers.ResNetModel(config), "ConvNextImageProcessor", size={"shortest_edge": 32}
    )
    spec = resolve_model(name)
    assert (spec.preprocess.view.resize, spec.preprocess.view.crop) == (36, 32)  # 32 / .875
    with LayerTap(spec.load(), spec.layers) as tap, torch.inference_mode():
        outputs = tap(spec.prepare(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)))
    assert [output.shape[1] for output in outputs.values()] == [8, 12]


def test_transformers_view_is_the_processor_s(vit: str, dinov2: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for name in (vit, dinov2):
        preprocess = get_model(name).preprocess
        processor = transformers.AutoImageProcessor.from_pretrained(name.removeprefix("hf/"))
        expected = processor(image, return_tensors="pt")["pixel_values"]
        # The processor resizes tensors, the view resizes images as torchvision does: a byte may differ by one.
        atol = 1.5 / 255 / min(preprocess.std)
        got = preprocess(torch.from_numpy(preprocess.view(image).copy())[None])
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_transformers_model_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    for name in ("hf/nobody/nothing", f"hf/{tmp_path}"):
        with pytest.raises(MilanError, match=r"is neither a folder with .* nor in the Hugging Face cache") as caught:
            get_model(name)
        assert "\n" not in str(caught.value)


def test_transformers_processor_without_fixed_size_is_refused(vit: str, tmp_path: Path) -> None:
    folder = tmp_path / "free"
    folder.mkdir()
    for file in Path(vit.removeprefix("hf/")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"shortest_edge": 32}}))
    with pytest.raises(MilanError, match="have no fixed size or scale"):
        get_model(f"hf/{folder}")


def test_transformers_file_that_lacks_weights_is_refused(vit: str, tmp_path: Path) -> None:
    source = Path(vit.removeprefix("hf/"))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(source / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MilanError, match=r"lack layernorm\.weight"):
        resolve_model(f"hf/{tmp_path}").load()


def test_transformers_weights_that_cannot_be_read_are_one_sentence(vit: str, tmp_path: Path) -> None:
    source = Path(vit.removeprefix("hf/"))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(MilanError, match=r"cannot be loaded \(.+\): save the model again") as caught:
        resolve_model(f"hf/{tmp_path}").load()
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MilanError, match=r"cannot be loaded \(.*no file named .*model\.safetensors"):
        resolve_model(f"hf/{tmp_path}").load()


def test_transformers_model_with_code_of_its_own_is_refused_without_a_question(vit: str, tmp_path: Path) -> None:
    config = json.loads((Path(vit.removeprefix("hf/")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    with pytest.raises(MilanError, match="custom code"):
        get_model(f"hf/{tmp_path}")
    assert not (tmp_path / "witness").exists()
