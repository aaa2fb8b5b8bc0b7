"""`cluster.yaml` is one that Ray's own launcher accepts."""

from __future__ import annotations

from pathlib import Path

import yaml

CLUSTER = Path(__file__).resolve().parents[1] / "cluster.yaml"


def test_cluster_yaml_passes_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0


def test_cluster_yaml_provider_has_no_misspelt_key():
    """Ray's schema accepts any key inside the provider."""
    config = yaml.safe_load(CLUSTER.read_text())
    assert set(config["provider"]) <= {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group"}
    assert config["available_node_types"]["gpu-worker"]["min_workers"] == 0
