"""--supported-by: descriptions that a judge does not support are as if they were not there."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from judged import JUDGE, judge

from milan_ray import cli
from milan_ray.config import config_hash
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import Known
from milan_ray.errors import MilanError
from milan_ray.schema import AUDITED, AUDITS, DESCRIPTIONS, EXEMPLARS
from milan_ray.scoring.supported import UNJUDGED, verdicts_by, with_verdicts
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.studies.analysis.run import Analysis, AnalysisConfig
from milan_ray.studies.editing.run import EditingConfig, unwanted_units
from milan_ray.studies.tables import read_descriptions, settings

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
SAID = {"0": ("red text", "text", "lines", "text", "a word", "lines"), "2": ("text", *["lines"] * 7)}
YES, NO = "supported", "unsupported"


def keys(layer: str = "0", model: str = "tiny/cnn") -> dict[str, str]:
    return {"labeler": "milan", "model": model, "layer": layer}


def describe(storage: Storage, of: dict[str, str], texts: tuple[str, ...], exemplars: str | None = None) -> None:
    rows = [{**of, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
    columns = {c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns}
    table = DESCRIPTIONS.table(columns, None if exemplars is None else {EXEMPLARS_KEY: exemplars})
    storage.write(DESCRIPTIONS, table, "".join(texts), **of)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path / "run")
    for layer, texts in SAID.items():
        describe(storage, keys(layer), texts)
        judge(storage, keys(layer), texts, [(YES, NO)[unit % 2] for unit in range(len(texts))])
    return storage


def test_only_supported_descriptions_are_read(storage):
    units = read_descriptions(storage, "tiny/cnn", ("0", "2"), "milan", JUDGE)
    assert units.rows() == [
        ("0", 0, "red text"), ("0", 2, "lines"), ("0", 4, "a word"),
        ("2", 0, "text"), ("2", 2, "lines"), ("2", 4, "lines"), ("2", 6, "lines"),
    ]  # fmt: skip
    assert len(read_descriptions(storage, "tiny/cnn", ("0", "2"), "milan")) == 14


def test_a_verdict_on_other_exemplars_is_none_though_the_description_reads_the_same(storage):
    texts = SAID["0"]
    judge(storage, keys(), texts, [YES] * len(texts), exemplars="first")
    describe(storage, keys(), texts, "first")
    assert len(read_descriptions(storage, "tiny/cnn", ("0",), "milan", JUDGE)) == len(texts)
    describe(storage, keys(), texts, "second")  # of another network, or of other features
    with pytest.raises(MilanError, match=f"{len(texts)} units of tiny/cnn 0 are .* by other images"):
        read_descriptions(storage, "tiny/cnn", ("0",), "milan", JUDGE)
    units = read_descriptions(storage, "tiny/cnn", ("0",), "milan").with_columns(
        labeler=pl.lit("milan"), model=pl.lit("tiny/cnn")
    )
    assert set(with_verdicts(units, verdicts_by(storage, JUDGE))["verdict"]) == {UNJUDGED}


def test_editing_removes_supported_units_alone(storage):
    config = EditingConfig(supported_by=JUDGE)
    units, unwanted = unwanted_units(storage, "tiny/cnn", ("0", "2"), config)
    assert units[unwanted].select("layer", "unit").rows() == [("0", 0), ("0", 4), ("2", 0)]
    units, unwanted = unwanted_units(storage, "tiny/cnn", ("0", "2"), EditingConfig())
    assert len(unwanted) == 5


def test_fingerprints_without_the_option_are_what_they_were_and_verdicts_decide_with_it(storage, photos):
    known = config_hash({"analysis": settings(AnalysisConfig(trials=1, fractions=(0.0, 0.5), words=("red",)))})
    assert known.startswith("dc38344d")  # as tests/faults/fingerprints.json has it
    model, probe = ModelRef("tiny/cnn", layers=("0", "2"), plugins=(PLUGIN,)), ProbeRef((str(photos),))

    def fingerprint(judge_: str | None) -> str:
        (output,) = Analysis(model, probe, "none", AnalysisConfig(supported_by=judge_)).outputs(Known(storage))
        return output.fingerprint.hash

    plain, judged = fingerprint(None), fingerprint(JUDGE)
    assert plain != judged
    judge(storage, keys("2"), SAID["2"], [YES] * 8)
    assert fingerprint(None) == plain and fingerprint(JUDGE) != judged


def test_missing_stale_and_empty_verdicts_are_one_sentence_each(storage):
    with pytest.raises(MilanError, match=r"no verdicts by clip on what milan says .* some by judge.*jobs.score"):
        read_descriptions(storage, "tiny/cnn", ("0",), "milan", "clip")
    describe(storage, keys(), ("other", *SAID["0"][1:]))
    with pytest.raises(MilanError, match=r"1 units of tiny/cnn 0 are described otherwise, or .* when judge"):
        read_descriptions(storage, "tiny/cnn", ("0",), "milan", JUDGE)
    judge(storage, keys("2"), SAID["2"], [NO] * 8)
    with pytest.raises(MilanError, match="judge supports no description of tiny/cnn by milan"):
        read_descriptions(storage, "tiny/cnn", ("2",), "milan", JUDGE)


def test_audit_counts_supported_descriptions_alone(tmp_path, capsys):
    storage = Storage(tmp_path / "run")
    for model in ("net/plain", "net/plain-blurred"):
        of = keys("conv1", model)
        describe(storage, of, ("faces", "a head", "sky", "noses"))
        judge(storage, of, ("faces", "a head", "sky", "noses"), [YES, NO, YES, YES if model == "net/plain" else NO])
        seen = {"unit": 0, "rank": 0, "image_id": 0, "activation": 1.0, "mask": b"\1", "model": model, "layer": "conv1"}
        table = EXEMPLARS.table({c.name: [seen[c.name]] for c in EXEMPLARS.columns}, {"probe": "p"})
        storage.write(EXEMPLARS, table, "e", model=model, layer="conv1")
    options = ["audit", "--storage", storage.root, "--no-report"]
    assert cli.main([*options, "--supported-by", "clip"]) == 1
    assert "no verdicts by clip" in capsys.readouterr().err
    assert cli.main([*options, "--supported-by", JUDGE]) == 0
    counts = pl.DataFrame(pl.from_arrow(storage.read(AUDITS, audit="faces")))
    assert counts.select("units", "of", "other_units", "other_of").rows() == [(2, 3, 1, 2)]
    assert storage.read(AUDITED, audit="faces")["unit"].to_pylist() == [0, 3, 0]
    assert cli.main(options) == 0
    counts = pl.DataFrame(pl.from_arrow(storage.read(AUDITS, audit="faces")))
    assert counts.select("units", "of", "other_units", "other_of").rows() == [(3, 4, 3, 4)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("verb", ["analyze", "edit"])
def test_command_line_hands_the_judge_on(storage, photos, capsys, verb):
    options = [verb, "--model", "tiny/cnn", "--plugin", PLUGIN, "--layers", "0", "2", "--probe", str(photos)]
    options += ["--storage", storage.root, "--dry-run"]
    assert cli.main([*options, "--supported-by", "clip"]) == 1
    assert "no verdicts by clip" in capsys.readouterr().err
    assert cli.main([*options, "--supported-by", JUDGE]) == 0
    assert "ablations" in capsys.readouterr().out
