"""Concept maps by a network: a tiny random SegFormer, saved and read as a real one, and a plug-in's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from milan_ray.cli import build_parser
from milan_ray.cli.build_configs import probe_ref
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.models.segmentation import Segmenter, register_segmenter
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import digest, image_refs

PLUGIN = """
import numpy as np

from milan_ray.models.segmentation import register_segmenter


class Halves:
    def __init__(self):
        print("halves are built")

    def identity(self):
        return VERSION

    def maps(self, image):
        left = np.arange(image.width) < image.width // 2
        return {"left": left[None], "right": ~left[None], "nothing": np.zeros((1, 1), bool)}


register_segmenter("own/halves", Halves)
"""

NAMES = {0: "background", 1: "Sky", 2: "tree", 3: "road"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-segformer"
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, id2label=NAMES
    )
    network = transformers.SegformerForSemanticSegmentation(config)
    with torch.no_grad():  # untrained, it sees one class everywhere
        network.decode_head.classifier.weight.mul_(100)
    network.save_pretrained(path)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return str(path)


def test_maps_are_those_of_transformers_in_the_images_own_pixels(folder, photos):
    found = references.probe(references.ProbeRef((str(photos),), segmentation=folder))
    assert not isinstance(found, LatentProbe)
    (ref,) = image_refs(found.manifest(), [1])
    image = found.read(ref).image
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**processor(images=image, return_tensors="pt")).logits
    size = (image.height, image.width)
    truth = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    maps = pickle.loads(pickle.dumps(found)).concept_maps(ref)
    shown = {number for number in truth.unique().tolist() if number}
    assert set(maps) == {NAMES[number].lower() for number in shown} and len(shown) > 1
    for number in shown:
        np.testing.assert_array_equal(maps[NAMES[number].lower()], (truth == number).numpy())


def test_who_made_the_maps_is_part_of_the_probes_identity(folder, photos, tmp_path):
    plain = references.probe(references.ProbeRef((str(photos),))).manifest()
    mapped = references.probe(references.ProbeRef((str(photos),), segmentation=folder)).manifest()
    assert mapped.schema == plain.schema and mapped.drop_columns("etag") == plain.drop_columns("etag")
    assert digest(mapped) != digest(plain)
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    network.save_pretrained(tmp_path)
    for file in Path(folder).glob("preprocessor*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert Segmenter(str(tmp_path)).identity() != Segmenter(folder).identity()


def test_a_network_is_found_in_the_models_folder_or_missed_with_one_sentence(folder, photos, monkeypatch, save_clip):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(Path(folder).parent))
    command = ["label", "--model", "m", "--probe", str(photos), "--segmentation", "tiny-segformer"]
    probe: Any = references.probe(probe_ref(build_parser().read(command)))
    assert probe.by.folder == folder
    with pytest.raises(MilanError, match=r"--segmentation"):
        Segmenter("absent")
    other = Segmenter(save_clip(Path(folder).parent / "clip"))
    with pytest.raises(MilanError, match=r"cannot be loaded .*for semantic segmentation"):
        other.maps(Image.new("RGB", (8, 8)))


def probe_of(plugin: Path, photos: Path, *more: str) -> Any:
    command = ["label", "--model", "m", "--probe", str(photos), "--plugin", str(plugin), *more]
    return references.probe(probe_ref(build_parser().read(command)))


def test_a_plug_ins_network_is_asked_by_name_and_travels_without_being_built(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    plugin = tmp_path / "halves.py"
    plugin.write_text(f"VERSION = '1'\n{PLUGIN}")
    probe = probe_of(plugin, photos, "--segmentation", "own/halves")
    assert "halves are built" not in capsys.readouterr().out
    etags = probe.manifest()["etag"].to_pylist()
    assert all(etag.endswith("+segmentation:own/halves:1") for etag in etags)
    (ref,) = image_refs(probe.manifest(), [1])
    copy = pickle.loads(pickle.dumps(probe))
    assert vars(copy.by) == {"name": "own/halves"}
    maps = copy.concept_maps(ref)
    assert set(maps) == {"left", "right"}
    width = probe.read(ref).image.width
    np.testing.assert_array_equal(maps["left"], np.arange(width)[None] < width // 2)
    assert capsys.readouterr().out.count("halves are built") == 2  # once here, once in the copy
    other = tmp_path / "halves2.py"
    other.write_text(f"VERSION = '2'\n{PLUGIN}")
    assert digest(probe_of(other, photos, "--segmentation", "own/halves").manifest()) != digest(probe.manifest())


@pytest.mark.parametrize("wrong", [np.ones((4, 4)), np.ones((1, 4, 4), bool), np.full((4, 4), 2, np.uint8)])
def test_maps_of_a_plug_in_that_are_no_masks_are_refused(wrong, photos):
    class Wrong:
        def identity(self) -> str:
            return "1"

        def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
            return {"sky": wrong}

    register_segmenter("own/wrong", Wrong)
    probe: Any = references.probe(references.ProbeRef((str(photos),), segmentation="own/wrong"))
    (ref,) = image_refs(probe.manifest(), [0])
    with pytest.raises(MilanError, match=r"own/wrong says where 'sky' is with .*: let it return bool \(H, W\)"):
        probe.concept_maps(ref)
