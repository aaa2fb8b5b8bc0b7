"""The benchmarks of encodings, descriptions and the whole job run, and their own checks hold."""

from __future__ import annotations

import pytest
import torch

from milan_ray.benchmarks import describe, encode, end_to_end
from milan_ray.benchmarks.captioners import Sizes, trained
from milan_ray.benchmarks.harness import Options
from milan_ray.errors import MilanError

SHORT = Options(repeats=1, threads=1, short=True)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_describe_short_finds_what_the_plain_search_finds():
    for result in describe.run(SHORT):
        assert result.facts["descriptions identical"] == "2 of 2"
        assert result.facts["candidates identical"] == "10 of 10"
        assert float(result.facts["largest difference in log p"]) < 1e-4


@pytest.mark.slow
def test_encode_short_compares_pooling_batches_and_the_stage(ray_session):
    names = [result.name for result in encode.run(SHORT)]
    assert [name.split()[0] for name in names] == ["pooling", "batch", "stage"]


@pytest.mark.slow
def test_end_to_end_short_describes_every_unit(ray_session):
    (result,) = end_to_end.run(SHORT)
    assert result.work == 64
    assert {"exemplars, seconds", "encodings, seconds", "descriptions, seconds"} < set(result.facts)


def test_trained_captioner_is_trained_once(tmp_path):
    sizes = Sizes.of(SHORT)
    first, again = trained(SHORT, sizes), trained(SHORT, sizes)
    assert len(list(tmp_path.glob("milan-ray-benchmark-*"))) == 1
    assert torch.equal(first.decoder.lstm.weight_hh, again.decoder.lstm.weight_hh)


def test_trained_captioner_without_the_annotations_says_what_to_give(tmp_path):
    with pytest.raises(MilanError, match="give the folder that holds MILANNOTATIONS"):
        trained(Options(short=True, annotations=tmp_path), Sizes.of(SHORT))
