"""``milan-ray effects``: what each option changes, what is refused, and that the report shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.schema import EFFECTS
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, GENERATORS = str(PLUGINS / "tiny_models.py"), str(PLUGINS / "tiny_generators.py")
NETWORK = ("effects", "--model", "tiny/cnn", "--plugin", TINY, "--layers", "4", "6")
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def measured(ray_session, photos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    dissect = ["exemplars", *NETWORK[1:], "--probe", str(photos), "--storage", str(root), "--no-report", "--k", "2"]
    assert cli.main(dissect) == 0
    assert cli.main([*NETWORK, "--probe", str(photos), "--storage", str(root), "--images", "12"]) == 0
    return root


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], None),
        (["--images", "13"], "images"),
        (["--amplify", "3"], "amplify"),
        (["--classes", "2"], "classes"),
        (["--units", "1"], None),
        (["--activations", "pre"], "activations"),
    ],
)
def test_options_of_effects_are_part_of_what_decides(measured, photos, options, changes, dry_run, tmp_path):
    images = () if "--images" in options else ("--images", "12")
    said = dry_run(str(measured), *NETWORK, "--probe", str(photos), *images, *options)
    if changes is None:
        assert not said
    else:
        assert set(said) == {"effects tiny/cnn 4", "effects tiny/cnn 6"}
        assert all(changes in reason for reason in said.values())
    if "--units" in options:
        command = [*NETWORK, "--probe", str(photos), "--storage", str(tmp_path), *images, *options, "--no-report"]
        assert cli.main(command) == 0
        assert set(Storage(tmp_path).read(EFFECTS, model="tiny/cnn", layer="4")["unit"].to_pylist()) == {1}


def test_measured_effects_have_as_many_images_and_classes_as_asked_for_and_are_in_the_report(measured):
    rows = Storage(measured).read(EFFECTS, model="tiny/cnn", layer="4").to_pylist()
    assert {row["images"] for row in rows} == {12} and len(rows) == 3 * 8
    assert max(len(row["gained"]) for row in rows) <= 4  # the network tells four classes
    folder = next(
        path.parent for path in (measured / "report").glob("layers/*/*/units.js") if '"4"' in path.read_text()
    )
    text = (folder / "cards/0.js").read_text(encoding="ascii")
    cards = json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")[2]
    shown = {card["unit"]: card["effect"]["changes"][0]["moved"] for card in cards}
    for row in rows:
        if row["change"] == "ablated":
            assert shown[row["unit"]] == pytest.approx(row["moved"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--amplify", "0.5"], "--amplify 0.5 does not amplify"),
        (["--units", "99"], "has 8 units, numbered from 0, and --units asks for 99"),
        (["--layers", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(photos, tmp_path, capsys, options, sentence):
    layers = () if "--layers" in options else ("--layers", "4")
    command = ["effects", "--model", "tiny/cnn", "--plugin", TINY, *layers, *options]
    assert cli.main([*command, "--probe", str(photos), "--storage", str(tmp_path), "--no-report"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and sentence in errors[0]


def test_models_that_fail_are_named_and_the_others_done(photos, tmp_path, capsys):
    command = ["effects", "--model", "tiny/cnn", "tiny/unweighted", "--plugin", TINY, "--probe", str(photos)]
    assert cli.main([*command, "--storage", str(tmp_path), "--images", "2", "--no-report", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "partly" and set(told["layers"]) == {"tiny/cnn"} and "tiny/unweighted" in told["skipped"]
