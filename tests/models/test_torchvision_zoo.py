from __future__ import annotations

import hashlib
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from torchvision import models

from milan_ray.errors import MilanError
from milan_ray.models import torchvision_zoo
from milan_ray.models.describe import layer_table
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import OUTPUTS, RANDOM, get_model, model_names
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import weights_digest

ARCHITECTURES = models.list_models(module=models)
# Their constructors compute with tensor values, which the meta device has not; the smallest stands for its family.
NOT_ON_META = [name for name in ARCHITECTURES if name.startswith("regnet") and name != "regnet_y_400mf"]


def test_zoo_every_classifier_is_registered_and_picklable_without_building_any() -> None:
    started = time.perf_counter()
    torchvision_zoo.register()
    assert time.perf_counter() - started < 1
    assert {f"{name}/imagenet" for name in ARCHITECTURES} <= set(model_names())
    spec = pickle.loads(pickle.dumps(get_model("resnet18/imagenet")))
    assert spec.layers == ("conv1", "layer1", "layer2", "layer3", "layer4")
    assert spec.preprocess.view.key == "r256-c224-bilinear-224x224"
    assert spec.classes[207] == "golden retriever"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in NOT_ON_META])
def test_zoo_default_layers_put_out_maps_of_units(architecture: str) -> None:
    """On the meta device: shapes without arithmetic."""
    spec = get_model(f"{architecture}/imagenet")
    if architecture.startswith("regnet"):
        model = torchvision_zoo.build(architecture, RANDOM).to("meta")
    else:
        with torch.device("meta"):
            model = torchvision_zoo.build(architecture, RANDOM)
    assert OUTPUTS not in spec.layers
    views = torch.zeros((2, *spec.preprocess.view.shape, 3), dtype=torch.uint8, device="meta")
    with LayerTap(model.eval(), spec.layers) as tap, torch.no_grad():
        outputs = tap(spec.prepare(views))
    for layer, output in outputs.items():
        maps = spec.unit_maps(layer, output)
        assert maps.shape[0] == 2 and maps.shape[2] == maps.shape[3] > 1, (layer, output.shape)
        assert maps.shape[1] >= 8


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("vgg")])
def test_zoo_default_layers_of_vggs_are_the_last_convolutions_of_their_stages(architecture: str) -> None:
    with torch.device("meta"):
        features = torchvision_zoo.build(architecture, RANDOM).get_submodule("features")
    kinds = [type(module).__name__ for module in features.children()]
    last = [
        max(i for i in range(pool) if kinds[i] == "Conv2d") for pool, kind in enumerate(kinds) if kind == "MaxPool2d"
    ]
    assert get_model(f"{architecture}/imagenet").layers == tuple(f"features.{i}" for i in last)


def test_zoo_random_weights_are_seed_0_and_leave_the_generator_alone(golden: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = resolve_model("resnet18/imagenet", RANDOM).load()
    assert torch.equal(torch.get_rng_state(), state)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    meta = json.loads((golden / "exemplars/resnet18/conv1/meta.json").read_text())
    assert digest.hexdigest() == meta["state_dict_sha256"]


@pytest.mark.parametrize(
    ("architecture", "file", "classes"),
    [
        ("squeezenet1_0", "squeezenet1_0_deepcompression.pth", 1000),
        ("mobilenet_v2", "mobilenet_v2_tf2_ptq.pth", 1000),
        ("mobilenet_v2", "mobilenet_v2_inat_bird_fp16.pth", 965),
    ],
)
def test_zoo_real_weights_load_strictly_with_their_own_classes(
    shared: Path, architecture: str, file: str, classes: int
) -> None:
    spec = resolve_model(f"{architecture}/imagenet", str(shared / "data/weights" / file))
    model = spec.load()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with LayerTap(model, [*spec.layers, OUTPUTS]) as tap, torch.inference_mode():
        outputs = tap(torch.zeros(1, 3, 224, 224))
    assert outputs[OUTPUTS].shape == (1, classes)


def test_zoo_weights_of_another_architecture_are_refused(shared: Path) -> None:
    spec = resolve_model("resnet18/imagenet", str(shared / "data/weights/mobilenet_v2_tf2_ptq.pth"))
    with pytest.raises(MilanError, match=r"does not fit ResNet: weights \d+ missing \(first: conv1\.weight"):
        spec.load()


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_zoo_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path, architecture: str) -> None:
    torch.save(models.get_model(architecture, weights=None, init_weights=False).state_dict(), tmp_path / "w.pth")
    model = resolve_model(f"{architecture}/imagenet", str(tmp_path / "w.pth")).load()
    assert model.transform_input and not any(name.lower().startswith("aux") for name in model.state_dict())


def test_zoo_absent_weights_error_names_file_places_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    with pytest.raises(MilanError) as caught:
        resolve_model("resnet18/imagenet")
    text = str(caught.value)
    assert "resnet18-f37072fd.pth" in text and "https://" in text and "\n" not in text
    assert str(tmp_path / "hub/hub/checkpoints") in text and str(tmp_path / "models") in text


def test_zoo_weights_in_the_models_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    random = resolve_model("squeezenet1_1/imagenet", RANDOM).load()
    torch.save(random.state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    spec = resolve_model("squeezenet1_1/imagenet")
    assert spec.weights == str(tmp_path / "squeezenet1_1-b8a52dc0.pth")
    assert weights_digest(spec.load()) == weights_digest(random)


def test_download_checks_the_hash_in_the_name_and_leaves_nothing_behind(tmp_path: Path) -> None:
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for source, good in (("good", True), ("bad", False)):
        (tmp_path / source).mkdir()
        (tmp_path / source / name).write_bytes(content if good else b"others")
        target = tmp_path / f"cache-{source}" / name
        if good:
            torchvision_zoo._download((tmp_path / source / name).as_uri(), target)
            assert target.read_bytes() == content
        else:
            with pytest.raises(MilanError, match="cannot download"):
                torchvision_zoo._download((tmp_path / source / name).as_uri(), target)
            assert not list(target.parent.iterdir())


def test_layer_table_of_an_absent_model_lists_layers_without_weights() -> None:
    table = {info.path: info for info in layer_table(get_model("squeezenet1_1/imagenet"))}
    assert table["features.3"].kind == "Fire"
    assert table["features.3"].shape == (128, 55, 55) and table["features.3"].units == 128
    assert table["features.3"].default and not table["features.1"].default
    assert table[OUTPUTS].shape == (1000,) and table[OUTPUTS].dissectable
