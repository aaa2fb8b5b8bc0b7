"""A network whose ``forward`` is written anew, its modules and weights as they were, is another network."""

from __future__ import annotations

import torch
from torch import nn

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars.behaviour import COMPUTES, same
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.schema import EXEMPLARS
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

CONFIG = ExemplarConfig(k=3, batch_size=8, shard_size=500)


class Two(nn.Module):
    sign = 1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.sign * self.a(x))


def register(sign: int) -> None:
    def build(weights: str | None) -> nn.Module:
        torch.manual_seed(0)
        model = Two()
        model.sign = sign
        return model

    register_model("rewritten/two", build, ["a", "b"], Preprocess(View(16, 16)))


def test_s1_a_forward_written_anew_makes_what_it_changes_anew(photos, tmp_path, capsys):
    storage, probe = Storage(tmp_path), ProbeRef((str(photos),))
    keys = [{"model": "rewritten/two", "layer": layer} for layer in "ab"]

    def run(sign: int) -> tuple[list[str], list[list[float]], str]:
        register(sign)
        Exemplars([ModelRef("rewritten/two")], probe, CONFIG).run(storage, Resources())
        hashes = [storage.config_of(EXEMPLARS, **key) for key in keys]
        values = [storage.read(EXEMPLARS, **key)["activation"].to_pylist() for key in keys]
        return hashes, values, capsys.readouterr().err

    def computes() -> str:
        entries = storage.metadata(EXEMPLARS, **keys[1])
        assert entries is not None
        return entries[COMPUTES]

    with connected(Resources()):
        hashes, values, _ = run(1)
        assert run(1)[:2] == (hashes, values)
        again, other, said = run(-1)
        assert "layer 'b' of rewritten/two computes something else" in said
        assert again[0] == hashes[0] and again[1] != hashes[1]  # what is made of these is stale, too
        assert other[0] == values[0] and other[1] != values[1]
        before = computes()
        repeated = run(-1)
        assert repeated[:2] == (again, other) and "up to date" in repeated[2]
        assert run(1)[1] == values
        assert not same(before, computes())


def test_s1_kernels_of_other_machines_are_no_other_computation():
    assert same("[1.0, 0.5, -0.2]", "[1.0001, 0.4999, -0.2]") and not same("[1.0, 0.5]", "[1.0, 0.55]")
    assert not same("[1.0]", "[1.0, 0.5]")
