"""The arithmetic of planning: each formula against a count, and against what kernels and a real run do."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from milan_ray.engine.costs import (
    LayerShape,
    ModelCost,
    Sample,
    TableSize,
    Wanted,
    carries_maps,
    distinct_images,
    emitted,
    emitted_tail,
    estimate,
    faster,
    images_read,
    in_bytes,
    in_hours,
    partial_bytes,
    text,
)
from milan_ray.engine.model_cache import MODELS_MEMORY
from milan_ray.exemplars.shard import Committed, LayerState, StateConfig, to_table

NET = ModelCost("net", (LayerShape("a", 64, 56, 56), LayerShape("b", 512, 7, 7)), 0.02, "view")
SAMPLE = Sample(
    images=48,
    device="cpu",
    threads=1,
    models=(NET,),
    read=0.01,
    picture=0.005,
    tables={
        name: TableSize(1000, each)
        for name, each in (
            ("manifest", 30), ("exemplars", 800), ("levels", 20), ("views", 60_000), ("pooled", 4000),
            ("encodings", 15_000), ("candidates", 50), ("descriptions", 300),
        )
    },
    encode=0.16,
    pool=0.0004,
    search=0.05,
    beam_size=50,
)  # fmt: skip


@pytest.mark.parametrize(("images", "k", "units"), [(1000, 15, 40), (500, 15, 1), (200, 5, 300), (30, 30, 4)])
def test_distinct_images_is_what_random_draws_give(images: int, k: int, units: int) -> None:
    rng = np.random.default_rng(0)
    counts = [
        len(np.unique(np.concatenate([rng.choice(images, k, replace=False) for _ in range(units)]))) for _ in range(20)
    ]
    assert distinct_images(images, k, units) == pytest.approx(np.mean(counts), rel=0.03)


def test_distinct_images_is_bounded_by_probe_and_exemplars() -> None:
    assert distinct_images(10, 15, 3) == 10
    assert distinct_images(10**6, 15, 0) == 0
    assert distinct_images(1_281_167, 15, 2_800_000) == pytest.approx(1_281_167)
    assert distinct_images(10**9, 15, 2) == pytest.approx(30, rel=1e-6)


@pytest.mark.parametrize(("per_shard", "kept", "shards"), [(15, 15, 10), (200, 30, 7), (4, 30, 200), (3, 100, 5)])
def test_emitted_is_the_sum_over_shards(per_shard: int, kept: int, shards: int) -> None:
    exact = sum(min(per_shard, kept / j) for j in range(1, shards + 1))
    assert emitted(per_shard, kept, shards) == pytest.approx(exact, rel=0.02)


def test_partials_of_an_actor_are_as_many_as_the_formula_says() -> None:
    """The real kernels over 24 shards of random maps, by one actor and by two."""
    generator = torch.Generator().manual_seed(0)
    images, size, units = 24 * 16, 16, 32
    plan = StateConfig(images, 5, 0.9, 2**20, 2**28)
    maps = torch.randn(images, units, 3, 3, generator=generator)
    for actors in (1, 2):
        topk = tail = 0
        for actor in range(actors):
            known = None
            for shard in range(actor, images // size, actors):
                state = LayerState.empty(plan, units, (3, 3))
                known = known or Committed(state)
                ids = np.arange(shard * size, (shard + 1) * size)
                state.update(maps[ids], ids, known)
                table = to_table(state, known.delta(state))
                topk += sum(map(len, table["image_ids"].to_pylist()))
                tail += sum(map(len, table["tail"].to_pylist()))
                known.commit(shard, state)
        own = images // size / actors
        assert topk == pytest.approx(units * actors * emitted(5, 5, own), rel=0.1)
        kept = math.ceil(0.1 * 9 * images) + 2
        assert tail == pytest.approx(units * actors * emitted_tail(9 * size, kept, own), rel=0.1)


def test_estimate_counts_passes_units_and_rows() -> None:
    found = estimate(SAMPLE, Wanted(images=1_281_167, copies=1000, actors=100, price=2.0))
    work = {line.what: line for line in found.work}
    assert work["forward passes, exemplars and levels"].count == 1_281_167_000
    assert work["forward passes, exemplars and levels"].hours == pytest.approx(1_281_167_000 * 0.02 / 3600)
    assert work["encoder passes"].count == pytest.approx(distinct_images(1_281_167, 15, 576_000))
    assert work["units searched"].count == found.units == 576_000
    tables = {table.name: table for table in found.tables}
    assert tables["exemplars"].rows == tables["encodings"].rows == 576_000 * 15
    assert tables["candidates"].rows == 576_000 * 50 and tables["descriptions"].rows == 576_000 * 2
    assert tables["encodings"].bytes == 576_000 * 15 * 15_000 + 2000 * 1000
    assert "pooled" not in tables
    assert found.elapsed == found.hours / 100 and found.price == 2 * found.hours


def test_estimate_is_linear_in_models_where_nothing_is_shared() -> None:
    """Images, encoder passes and views are shared: a second model of the same view costs less than the first."""
    one, two = (estimate(SAMPLE, Wanted(images=5000, copies=copies)) for copies in (1, 2))
    first, second = ({line.what: line.seconds for line in found.work} for found in (one, two))
    shared = {"images read and decoded", "encoder passes", "views of exemplars"}
    for what, seconds in first.items():
        assert second[what] < 2 * seconds if what in shared else second[what] == pytest.approx(2 * seconds)
    apart = replace(SAMPLE, models=(NET, replace(NET, name="other", view="another view")))
    found = {line.what: line.seconds for line in estimate(apart, Wanted(images=5000)).work}
    assert found["encoder passes"] == pytest.approx(2 * first["encoder passes"])


def test_estimate_counts_another_pass_for_layers_too_large_to_carry() -> None:
    wanted = Wanted(images=10**6, map_budget=2 * 2**20)
    assert not carries_maps(NET.layers[0], wanted) and carries_maps(NET.layers[1], wanted)
    line = {line.what: line for line in estimate(SAMPLE, wanted).work}["forward passes of winners, for masks"]
    assert line.count == pytest.approx(distinct_images(10**6, 15, 64))
    assert line.seconds == pytest.approx(line.count * 0.02)
    whole = Wanted(images=10**6, map_budget=2**40)
    assert partial_bytes(NET.layers[0], whole) > partial_bytes(NET.layers[0], wanted)


def test_estimate_without_captioner_says_so_and_leaves_its_tables_out() -> None:
    bare = replace(SAMPLE, encode=None, pool=None, search=None, beam_size=0)
    found = estimate(bare, Wanted(images=1000, pooled=True))
    assert {table.name for table in found.tables} == {"manifest", "exemplars", "levels", "views", "pooled"}
    assert "--decoder" in text(found, bare) and "--decoder" not in text(estimate(SAMPLE, Wanted(images=9)), SAMPLE)


def test_models_of_a_view_are_read_for_together_as_far_as_an_actor_has_room() -> None:
    wanted = Wanted(images=1000, copies=20)
    small = replace(NET, layers=(LayerShape("a", 2),), weights=1)
    assert images_read((small,), wanted) == 1000 * 2  # 16 and 4
    assert images_read((small, replace(small, view="other")), wanted) == 1000 * 4
    assert images_read((replace(small, weights=MODELS_MEMORY // 3),), wanted) == 1000 * 10
    assert images_read((replace(small, weights=2 * MODELS_MEMORY),), wanted) == 1000 * 20
    exact = Wanted(images=10_000, samples=10**9)
    wide = replace(NET, weights=0)  # 64 units of 56 × 56 positions, 512 of 7 × 7
    plan = StateConfig(10_000, 15, 0.99, 10**9, 0)
    states = [plan.committed_bytes(layer.units, (layer.height, layer.width)) for layer in wide.layers]
    fit = MODELS_MEMORY // sum(states)
    assert 1 < fit < 16
    assert images_read((wide,), replace(exact, copies=fit)) == 10_000
    assert images_read((wide,), replace(exact, copies=fit + 1)) == 20_000


def test_faster_actors_still_have_to_read_images() -> None:
    found = faster(SAMPLE, 10)
    assert found.models[0].seconds == 0.002 and found.encode == 0.016 and found.read == SAMPLE.read
    slow, fast = (estimate(each, Wanted(images=10**6)) for each in (SAMPLE, found))
    assert {line.what: line.seconds for line in slow.work}["images read and decoded"] == 10_000
    assert fast.hours < slow.hours / 2


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (1234, "1.23 kB"), (15e9, "15 GB"), (2.5e18, "2.5e+03 PB")])
def test_bytes_are_said_in_decimal_units(count: float, said: str) -> None:
    assert in_bytes(count) == said


@pytest.mark.parametrize(("hours", "said"), [(0.01, "36 s"), (0.2, "12 min"), (3.4, "3.4 h"), (24000, "1,000 days")])
def test_hours_are_said_in_the_unit_that_fits(hours: float, said: str) -> None:
    assert in_hours(hours) == said
