"""A small sparse autoencoder finds directions that neither neurons nor principal components are."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from milan_ray.plugins import load_plugins
from milan_ray.scoring.directions import both_signs, recovered
from milan_ray.world.plugin import register
from milan_ray.world.superposition import CHANNELS, directions
from milan_ray.world.training import superposed_task

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples/superposition.py")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(EXAMPLE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The program sets the number of threads; the test's own comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sparse_coder_encodes_as_its_formula_says(example: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(7, 4, generator=draw), torch.randn(7, 4, generator=draw)
    bias, mean = torch.randn(7, generator=draw), torch.randn(4, generator=draw)
    coder = example["SparseCoder"](encoder, bias, decoder, mean, 2)
    vectors = torch.randn(3, 5, 4, generator=draw)
    codes = coder.encode(vectors)
    for place in np.ndindex(3, 5):
        values = [max(0.0, float(encoder[n] @ (vectors[place] - mean) + bias[n])) for n in range(7)]
        kept = sorted(range(7), key=lambda n: -values[n])[:2]
        wanted = [value if n in kept else 0.0 for n, value in enumerate(values)]
        np.testing.assert_allclose(codes[place], wanted, atol=1e-5)
    torch.testing.assert_close(coder.decode(codes), torch.einsum("abf,fc->abc", codes, decoder) + mean)


def test_autoencoder_recovers_planted_directions_of_the_true_concept_maps(
    example: dict[str, Any], one_thread: None
) -> None:
    scenes = example["scenes_of"]("probe", 0, 400, None)
    layer = example["Bottleneck"](scenes, scenes, directions())
    vectors = layer.outputs(scenes).flatten(0, 1)
    coder = example["fit_topk"](vectors, 64, 4, steps=800)
    found = coder.decoder.numpy()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    codes = coder.encode(vectors[::31])
    assert int((codes > 0).sum(dim=1).max()) <= 4
    error = (vectors[::31] - coder.decode(codes)).square().sum()
    assert error < 0.1 * (vectors[::31] - vectors.mean(dim=0)).square().sum()
    neurons = recovered(both_signs(np.eye(CHANNELS)), directions())
    components = recovered(both_signs(example["principal_components"](vectors)), directions())
    assert recovered(found, directions()) >= max(neurons, components) + 0.5
    again = example["fit_topk"](vectors, 64, 4, steps=20)
    assert torch.equal(again.decoder, example["fit_topk"](vectors, 64, 4, steps=20).decoder)
    assert not torch.equal(again.decoder, example["fit_topk"](vectors, 64, 4, steps=20, seed=1).decoder)


def test_program_prints_both_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = runpy.run_path(EXAMPLE)
    monkeypatch.setitem(run["main"].__globals__, "SCENES", 40)
    monkeypatch.setitem(run["main"].__globals__, "WIDTHS", (32,))
    monkeypatch.setattr(sys, "argv", [EXAMPLE, "--truth", "--scenes", "50", "--steps", "3", "--seeds", "2"])
    before = torch.get_num_threads()
    run["main"]()
    torch.set_num_threads(before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("27 concepts, of which 1.") and lines[0].endswith("50 scenes")
    assert "| 18 | true directions | 1.00 | 0.9" in "\n".join(lines)
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 32 ")] == ["2", "3", "4", "6", "8"]
    assert "recovered, 2 seeds" in "\n".join(lines)


@pytest.mark.slow
def test_trained_network_s_directions_beat_its_neurons(
    example: dict[str, Any], one_thread: None, tmp_path: Path
) -> None:
    """The figures of docs/features-world.md, loosely: a minute of training."""
    load_plugins()
    task = superposed_task()
    (tmp_path / task.file).write_bytes(task.run())
    try:
        register(str(tmp_path))
        network = example["get_model"]("world/superposed").load()
    finally:
        register()
    train = example["scenes_of"]("probe", 0, 1_000, network)
    judge = example["scenes_of"]("heldout", 0, 1_000, network)
    layer = example["Bottleneck"](train, judge, directions())
    inverse, neurons = np.linalg.pinv(directions()).T, both_signs(np.eye(CHANNELS, dtype=np.float32))
    planted, dual = (layer.auroc(example["products"](rows), own=True) for rows in (directions(), inverse))
    single = layer.auroc(example["products"](neurons))
    assert planted >= 0.94 and dual >= 0.95 and single <= 0.8
    coder = example["fit_topk"](layer.outputs(train).flatten(0, 1), 128, 4, steps=1_000)
    assert recovered(coder.decoder.numpy(), directions()) >= 0.7
    assert layer.auroc(coder.encode) >= single + 0.1
