"""The library calls, against the kernels and the reference's captions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_captioner

import milan_ray
from milan_ray.captioner.encoder import pool_maps
from milan_ray.errors import MilanError
from milan_ray.library.run_directory import RunExemplars
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, VIEWS, Table
from milan_ray.stages.captioners import save_captioner
from milan_ray.stages.encodings import encode
from milan_ray.storage import EXEMPLARS_KEY, Storage

PLUGIN = str(Path(__file__).parent / "plugins/tiny_models.py")


SIDE, K, MODEL = 24, 4, "tiny/cnn"
UNITS = {"0": 3, "2": 2}
PIXELS = np.random.default_rng(2).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
MASKS = np.random.default_rng(3).random((6, SIDE, SIDE)) < 0.3
BEST = [{"text": "a dog", "score": 1.0, "logp_d_given_e": -2.0, "logp_d": -6.0}]


def write(
    storage: Storage, table: Table, rows: Sequence[tuple[object, ...]], metadata: dict[str, str] | None = None
) -> None:
    columns = dict(zip((column.name for column in table.columns), map(list, zip(*rows, strict=True)), strict=True))
    keys = {key: str(columns[key][0]) for key in table.partition}
    storage.write(table, table.table(columns, metadata), "by hand", **keys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run directory with a captioner, and exemplars and descriptions of two layers; image = unit + rank."""
    storage = Storage(tmp_path_factory.mktemp("api") / "run")
    save_captioner(storage, "toy", toy_captioner(length=5, beam_size=6, lam=0.5), "A toy.")
    for layer, units in UNITS.items():
        exemplars = [
            (MODEL, layer, u, rank, u + rank, 9.0 - rank, np.packbits(MASKS[u + rank]).tobytes())
            for u in range(units)
            for rank in reversed(range(K))
        ]
        size = {"mask_height": str(SIDE), "mask_width": str(SIDE)}
        write(storage, EXEMPLARS, exemplars, {**size, "probe": "p", "view": "v"})
        for labeler, text in (("milan", "a dog"), ("milan-pdE", "dogs")):
            described = [(labeler, MODEL, layer, u, f"{text} {u}", 1.0, -2.0, -6.0, 0.5, BEST) for u in range(units)]
            write(storage, DESCRIPTIONS, described)
    for block in range(2):
        pngs = [(i, png(PIXELS[i])) for i in range(3 * block, 3 * block + 3)]
        write(storage, VIEWS, [("p", "v", str(block), i, data) for i, data in pngs])
    return storage


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def milan(run: Storage) -> milan_ray.Milan:
    return milan_ray.load("toy", run.root, device="cpu", plugins=(PLUGIN,))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """3 units × 4 exemplars, uint8; five different images in all."""
    different = np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), dtype=np.uint8)
    return different[np.arange(12).reshape(3, 4) % 5]


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    found = np.random.default_rng(1).random((3, 4, 1, 24, 24)) < 0.3
    found[0, 1] = False  # one empty mask among others is no error
    return found


def test_import_stays_light_and_library_calls_need_no_ray() -> None:
    code = (
        "import milan_ray, sys; print({'torch', 'ray', 'numpy'} & set(sys.modules)); "
        "milan_ray.load; print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "False"]


def test_unknown_name_in_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        milan_ray.nothing  # noqa: B018


def test_parity_describe_of_the_reference_s_toy_annotations_gives_its_captions(golden: Path) -> None:
    exemplars = milan_ray.open_exemplars(golden / "milannotations/toy/shapes")
    samples = [exemplars.lookup(layer, unit) for layer, unit in exemplars.units()]
    milan = milan_ray.load(golden / "milan-toy.pth", device="cpu", reference_quirks=True)
    found = milan.describe([sample.images for sample in samples], [sample.masks for sample in samples])
    expected = json.loads((golden / "language/decode_goldens.json").read_text())["predict_rerank_dataset"]
    assert found["description"].to_list() == expected
    with np.load(golden / "language/features_shapes.npz") as file:
        features = milan.encode(
            np.stack([sample.images for sample in samples]), np.stack([sample.masks for sample in samples])
        )
        np.testing.assert_allclose(features, file["features"], rtol=1e-4, atol=1e-4)


def test_encode_equals_one_encoder_pass_per_exemplar(milan, images, masks) -> None:
    pixels = torch.from_numpy(images).flatten(0, 1) * (1 / 255)
    expected = milan.encoder(pixels, torch.from_numpy(masks).flatten(0, 2).float()).view(3, 4, -1).numpy()
    np.testing.assert_allclose(milan.encode(images, masks), expected, atol=1e-6)
    np.testing.assert_allclose(milan.encode(images), milan.encoder(pixels).view(3, 4, -1).numpy(), atol=1e-6)
    assert not milan.encode(images, masks)[0, 1].any()


def test_encode_sees_every_different_image_once(milan, images, masks, monkeypatch) -> None:
    seen = []
    passes = milan.encoder.maps

    def watched(batch: torch.Tensor) -> object:
        seen.append(len(batch))
        return passes(batch)

    monkeypatch.setattr(milan.encoder, "maps", watched)
    milan.encode(images, masks)
    assert seen == [5]


def test_encode_resizes_only_when_told_to_and_then_as_the_jobs_do(milan, images) -> None:
    small = images[:, :, :, :16, :16]
    pngs = [png(image.transpose(1, 2, 0)) for image in small.reshape(-1, 3, 16, 16)]
    whole = torch.ones(12, 16, 16)
    expected = pool_maps(encode(milan.encoder, pngs, 12), whole, torch.arange(12)).view(3, 4, -1)
    np.testing.assert_allclose(milan.encode(small, resize=True), expected, atol=1e-6)
    assert np.abs(milan.encode(small) - expected.numpy()).max() > 1e-3


def test_encode_takes_every_usual_form_of_images_and_masks(milan, images, masks, tmp_path) -> None:
    expected = milan.encode(images, masks)
    np.save(tmp_path / "images.npy", images)
    last = images.transpose(0, 1, 3, 4, 2)
    forms = [
        (torch.from_numpy(images), torch.from_numpy(masks).to(torch.bfloat16)),
        (np.load(tmp_path / "images.npy", mmap_mode="r"), masks.astype(np.uint8)),
        (images.astype(np.float32) * np.float32(1 / 255), masks[:, :, 0].astype(np.float32)),
        (last, masks.transpose(0, 1, 3, 4, 2)),
        ([[Image.fromarray(one) for one in unit] for unit in last], [list(unit[:, 0]) for unit in masks]),
        (images.astype(float) / 255, [[Image.fromarray(one[0]) for one in unit] for unit in masks]),
    ]
    for given, regions in forms:
        np.testing.assert_allclose(milan.encode(given, regions), expected, atol=1e-5)


def test_describe_gives_the_kernel_s_best_and_distinct_others(milan, images, masks) -> None:
    found = milan.describe(images, masks, n_best=3)
    expected = milan.captioner.describe(milan.encode(images, masks))
    assert found["unit"].to_list() == [0, 1, 2]
    assert found["description"].to_list() == [unit[0].text for unit in expected]
    assert found["score"].to_list() == pytest.approx([unit[0].score for unit in expected])
    for row in found.to_dicts():
        texts, scores = ([one[name] for one in row["n_best"]] for name in ("text", "score"))
        assert len(set(texts)) == len(texts) <= 3 and texts[0] == row["description"]
        assert scores == sorted(scores, reverse=True)
        assert row["lam"] == 0.5
        assert row["score"] == pytest.approx(row["logp_d_given_e"] - 0.5 * row["logp_d"], abs=1e-5)
    likeliest = milan.describe(images, masks, lam=0, beam_size=4)
    assert likeliest["score"].to_list() == likeliest["logp_d_given_e"].to_list()


def test_describe_without_a_language_model_ranks_by_likelihood(milan, images) -> None:
    alone = replace(milan, captioner=replace(milan.captioner, lm=None))
    found = alone.describe(images)
    assert found["logp_d"].null_count() == 3 and found["lam"].to_list() == [0, 0, 0]
    assert len(alone.describe(images[:0])) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i, m: (i[0], m), r"images have shape \(4, 3, 24, 24\): give \(units"),
        (lambda i, m: (i[:, :, :2], m), "images have shape"),
        (lambda i, m: (i[:, :0], m), "images have shape"),
        (lambda i, m: ([], None), r"images have shape \(0,\)"),
        (lambda i, m: (i.astype(int), m), "images are of type int64"),
        (lambda i, m: (i.astype(object), m), "images are of type object"),
        (lambda i, m: (i.astype(np.float32), m), r"outside \[0, 1\]"),
        (lambda i, m: (np.full(i.shape, np.nan, np.float32), m), "images hold NaN"),
        (lambda i, m: ([i[0], i[1, :2]], None), "images have different shapes"),
        (lambda i, m: (i, m[:2]), r"masks have shape \(2, 4, 1, 24, 24\) and images \(3, 4"),
        (lambda i, m: (i, m[..., :12]), "one mask of the image's size"),
        (lambda i, m: (i, m[..., 0]), "masks have shape"),
        (lambda i, m: (i, m * 255), "masks of unit row 0 hold NaN or numbers outside"),
        (lambda i, m: (i, np.where(m, np.nan, 1)), "masks of unit row 0 hold NaN"),
        (lambda i, m: (i, np.full(m.shape, "x")), "masks are of type <U1"),
        (lambda i, m: (i, m & (np.arange(3) != 1)[:, None, None, None, None]), r"unit rows \[1\] are empty in all"),
    ],
)
def test_describe_of_wrong_input_is_one_sentence(milan, images, masks, change, reason: str) -> None:
    with pytest.raises(MilanError, match=reason) as caught:
        milan.describe(*change(images, masks))
    assert "\n" not in str(caught.value)


def test_describe_wrong_options_are_one_sentence(milan, images, masks) -> None:
    with pytest.raises(MilanError, match="n_best is 0"):
        milan.describe(images, masks, n_best=0)
    with pytest.raises(MilanError, match="beam"):
        milan.describe(images, masks, beam_size=500)


def test_load_finds_a_published_captioner_by_its_key(golden: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "milan-base.pth").symlink_to(golden / "milan-toy.pth")
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    milan = milan_ray.load(device="cpu")
    assert (milan.captioner.encoder_name, milan.captioner.lam) == ("resnet18", 0.2)


def test_load_of_nothing_says_where_it_looked(run: Storage, tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="absent"):
        milan_ray.load("absent", run.root)
    with pytest.raises(MilanError, match=r"milan-absent\.pth"):
        milan_ray.load(tmp_path / "milan-absent.pth")


def test_lookup_gives_images_masks_activations_and_all_that_was_said(run: Storage) -> None:
    exemplars = milan_ray.open_exemplars(run.root, MODEL)
    assert isinstance(exemplars, RunExemplars)
    assert exemplars.layers == ["0", "2"]
    assert exemplars.units() == [("0", 0), ("0", 1), ("0", 2), ("2", 0), ("2", 1)]
    unit = exemplars.lookup(0, 2)
    assert (unit.model, unit.layer, unit.unit) == (MODEL, "0", 2)
    assert unit.image_ids.tolist() == [2, 3, 4, 5] and unit.activations.tolist() == [9, 8, 7, 6]
    np.testing.assert_array_equal(np.rint(unit.images * 255), PIXELS[2:].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(unit.masks[:, 0], MASKS[2:])
    assert unit.description == "a dog 2"
    assert set(unit.descriptions["description"]) == {"a dog 2", "dogs 2"}
    assert unit.annotations == ()
    assert unit.grid(columns=2).size == (2 * (SIDE + 2) + 2, 2 * (SIDE + 2) + 2)
    dark = unit.masked_images() < unit.images
    assert not dark[np.broadcast_to(unit.masks > 0, dark.shape)].any() and dark.any()


def test_lookup_samples_can_be_described(run: Storage, milan) -> None:
    exemplars = milan_ray.open_exemplars(run.root)
    units = [exemplars.lookup(layer, unit) for layer, unit in exemplars.units()]
    features = milan.encode([unit.images for unit in units], [unit.masks for unit in units])
    image, mask = torch.from_numpy(PIXELS[3]).permute(2, 0, 1)[None] * (1 / 255), torch.from_numpy(MASKS[3])[None]
    np.testing.assert_allclose(features[4, 2], milan.encoder(image, mask.float())[0], atol=1e-6)


def test_lookup_leaves_out_what_speaks_of_earlier_exemplars(run: Storage) -> None:
    current = run.config_of(EXEMPLARS, model=MODEL, layer="2")
    for source, text, of in (("a", "blue", current), ("b", "red", "earlier ones"), ("c", "green", None)):
        metadata = {EXEMPLARS_KEY: of} if of else None
        write(run, ANNOTATIONS, [(source, MODEL, "2", 1, "someone", text)], metadata)
    exemplars = milan_ray.open_exemplars(run.root)
    assert exemplars.lookup("2", 1).annotations == ("blue", "green")
    assert exemplars.lookup("2", 0).annotations == ()


def test_lookup_of_what_is_not_there_is_one_sentence(run: Storage, tmp_path: Path, golden: Path, monkeypatch) -> None:
    exemplars = milan_ray.open_exemplars(run.root)
    for layer, unit, reason in (
        ("3", 0, "unknown layer '3'"),
        ("0", 6, "no exemplars of unit 6 in layer '0'"),
        ("0", -1, "unit -1"),
    ):
        with pytest.raises(MilanError, match=reason):
            exemplars.lookup(layer, unit)
    with pytest.raises(MilanError, match="unknown model 'tiny/cmm'; nearest: tiny/cnn"):
        milan_ray.open_exemplars(run.root, "tiny/cmm")
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path))
    with pytest.raises(MilanError, match="set alexnet/imagenet is not in"):
        milan_ray.open_exemplars("base")
    with pytest.raises(MilanError, match="nosuch"):
        milan_ray.open_exemplars("nosuch")
    with pytest.raises(MilanError, match="model= has no meaning"):
        milan_ray.open_exemplars(golden / "milannotations/toy/shapes", "tiny/cnn")
    (tmp_path / "exemplars").mkdir()
    with pytest.raises(MilanError, match="holds no exemplars"):
        milan_ray.open_exemplars(tmp_path)


def test_lookup_of_a_published_set_gives_its_sample(golden: Path) -> None:
    sample = milan_ray.open_exemplars(golden / "milannotations/toy/shapes").lookup("conv1", 0)
    assert sample.images.shape == (5, 3, 64, 64)
    assert sample.annotations[0] == "dark corners"


def test_descriptions_frame_has_the_columns_of_the_table(milan, images, masks) -> None:
    found = milan.describe(images, masks)
    assert set(found.columns) == {column.name for column in DESCRIPTIONS.columns} - set(DESCRIPTIONS.partition)


def test_run_directory_is_read_as_frames(run) -> None:
    found = milan_ray.open_exemplars(run.root, MODEL)
    assert isinstance(found, RunExemplars)
    assert len(found.exemplars) == sum(UNITS.values()) * K
    assert found.exemplars.columns == ["layer", "unit", "rank", "image_id", "activation"]
    said = found.descriptions.filter(labeler="milan", layer="0")
    assert said.sort("unit")["description"].to_list() == [f"a dog {unit}" for unit in range(UNITS["0"])]
    assert said.columns == [column.name for column in DESCRIPTIONS.columns]
