"""The identity of a configuration: the same everywhere, and changed by all that decides results."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milan_ray.config import Arithmetic, ExemplarConfig, canonical, config_hash, data_dir, models_dir, results_dir

OTHER: dict[str, Any] = {
    "k": 16,
    "quantile": 0.995,
    "mask_size": (112, 112),
    "batch_size": 127,
    "samples": 2**20 + 1,
}
OTHER["arithmetic"] = Arithmetic("bfloat16")
# The bytes of views are part of the view's own key.
WITHOUT_EFFECT: dict[str, Any] = {
    "shard_size": 17,
    "map_budget": 0,
    "max_bad": 0.5,
    "truncate_bytes": True,
    "pooled": True,
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    name: str


def reversed_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_order(value[key]) for key in reversed(list(value))}
    return [reversed_order(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), JSON, max_size=4))
def test_config_hash_does_not_depend_on_the_order_of_keys(config):
    assert config_hash(reversed_order(config)) == config_hash(config)


def test_config_hash_is_the_same_in_other_processes():
    script = (
        "from milan_ray.config import ExemplarConfig, config_hash;"
        "print(config_hash({'z': ExemplarConfig().identity(), 'η': {'b': (1, 2), 'a': 0.1}, 'n': None}))"
    )
    expected = config_hash({"n": None, "η": {"a": 0.1, "b": [1, 2]}, "z": ExemplarConfig().identity()})
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_config_hash_is_pinned():
    """Changing it would make every stored table stale: then change this number on purpose."""
    assert config_hash({"config": ExemplarConfig().identity()}) == "d6cf8d1e22b2fc2b"


def test_canonical_takes_dataclasses_as_objects_and_tuples_as_lists():
    assert canonical({"view": Inner((2, 3), "ü")}) == '{"view": {"name": "ü", "size": [2, 3]}}'
    assert canonical(Inner((2, 3), "ü")) == canonical({"name": "ü", "size": [2, 3]})


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Path("/x"), Inner])
def test_canonical_refuses_what_has_no_stable_text(value):
    with pytest.raises(TypeError, match="a configuration cannot hold"):
        canonical({"value": value})


def test_every_field_of_the_exemplar_config_is_classified():
    assert {field.name for field in fields(ExemplarConfig)} == OTHER.keys() | WITHOUT_EFFECT.keys()
    assert ExemplarConfig().identity().keys() == OTHER.keys()


@pytest.mark.parametrize("name", OTHER)
def test_identity_changes_with_what_decides_results(name):
    changed = replace(ExemplarConfig(), **{name: OTHER[name]})
    assert config_hash(changed.identity()) != config_hash(ExemplarConfig().identity())


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_identity_does_not_change_with_what_decides_no_activation(name):
    changed = replace(ExemplarConfig(), **{name: WITHOUT_EFFECT[name]})
    assert config_hash(changed.identity()) == config_hash(ExemplarConfig().identity())


def test_directories_come_from_the_environment_else_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILAN_MODELS_DIR", raising=False)
    monkeypatch.delenv("MILAN_RESULTS_DIR", raising=False)
    monkeypatch.delenv("MILAN_DATA_DIR", raising=False)
    assert (data_dir(), models_dir(), results_dir()) == tuple(tmp_path / name for name in ("data", "models", "results"))
    monkeypatch.setenv("MILAN_DATA_DIR", "/data")
    assert data_dir() == Path("/data")
    monkeypatch.setenv("MILAN_MODELS_DIR", "elsewhere")
    monkeypatch.setenv("MILAN_RESULTS_DIR", "~/results")
    monkeypatch.setenv("HOME", "/home/someone")
    assert (models_dir(), results_dir()) == (tmp_path / "elsewhere", Path("/home/someone/results"))
