"""What `cluster.yaml` and the RayJob manifest say is what Ray, EC2 and KubeRay accept, as far as can be told here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from milan_ray import cli

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"
TYPES = ("head", "gpu-worker", "cpu-worker")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def test_cluster_yaml_passes_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0


def test_cluster_yaml_provider_has_no_misspelt_key(config):
    """Ray's schema accepts any key inside the provider."""
    assert set(config["provider"]) <= {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group"}
    assert set(config["provider"]["security_group"]) <= {"GroupName", "IpPermissions"}
    assert config["provider"]["type"] == "aws"
    assert set(config["auth"]) == {"ssh_user"}


def test_cluster_yaml_node_configs_are_what_ec2_takes(config):
    """Ray's schema accepts any key inside a node's configuration, too; EC2's own model does not."""
    session = pytest.importorskip("botocore.session", reason="EC2's model comes with the extra test")
    from botocore.validate import ParamValidator

    shape = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name in TYPES:
        request = {**config["available_node_types"][name]["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()


def test_cluster_yaml_head_does_no_work_and_workers_come_and_go(config):
    head, gpu, cpu = (config["available_node_types"][name] for name in TYPES)
    assert config["head_node_type"] == "head" and len(config["available_node_types"]) == 3
    assert head["resources"] == {"CPU": 0}
    assert head["node_config"]["InstanceType"].startswith("m")
    assert gpu["resources"]["GPU"] == 1 and "GPU" not in cpu["resources"]
    for worker in (gpu, cpu):
        assert worker["min_workers"] == 0 and worker["max_workers"] >= 8
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["node_config"]["IamInstanceProfile"]["Name"]
    assert config["max_workers"] == gpu["max_workers"] + cpu["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert not config["provider"]["cache_stopped_nodes"]
    assert len({config["available_node_types"][name]["node_config"]["ImageId"] for name in TYPES}) == 1


def test_cluster_yaml_set_up_installs_this_project(config):
    ((there, here),) = config["file_mounts"].items()
    assert (ROOT / here / "pyproject.toml").is_file()
    commands = config["setup_commands"]
    (install,) = (command for command in commands if "pip install" in command)
    assert install.endswith(f"-e {there}")
    venv = install.split("/bin/pip")[0]
    assert any("-m venv" in command and venv in command for command in commands)
    assert any(f"{venv}/bin:$PATH" in command and ".bashrc" in command for command in commands)
    assert {".git", ".venv"} <= set(config["rsync_exclude"])


def test_cluster_yaml_opens_nothing_but_ssh(config):
    """Ray's own rules for the security group, with what the file adds to them."""
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    added = config["provider"]["security_group"].get("IpPermissions", [])
    world = [rule for rule in _create_default_inbound_rules(["sg"], added) if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)]
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config" in start


def commands_in(text: str) -> list[list[str]]:
    """Commands ``python -m jobs.VERB …``, lines joined at backslashes."""
    joined = re.sub(r"\s*\\\n\s*#?\s*", " ", text)
    return [shlex.split(found) for found in re.findall(r"python -m jobs\.(?!status)\w+ --[^\n`]*", joined)]


@pytest.mark.parametrize("file", ["cluster.yaml", "docs/cluster.md"])
def test_commands_of_the_cluster_pages_are_understood(file, monkeypatch):
    found = commands_in((ROOT / file).read_text())
    assert found
    for _, _, module, *options in found:
        verb = module.removeprefix("jobs.")
        summary, add, _ = cli.VERBS[verb]
        monkeypatch.setitem(cli.VERBS, verb, (summary, add, lambda args: 0))
        if "…" not in options:  # a command in full
            assert cli.main([verb, *options]) == 0


def manifest() -> dict[str, Any]:
    (block,) = re.findall(r"```yaml\n(apiVersion: ray.io/v1.*?)```", (ROOT / "docs/cluster.md").read_text(), re.S)
    return yaml.safe_load(block)


def test_rayjob_manifest_has_the_structure_of_one():
    job = manifest()
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"} and job["kind"] == "RayJob"
    spec = job["spec"]
    assert set(spec) <= {"entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
                         "backoffLimit", "rayClusterSpec"}  # fmt: skip
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
                            "workerGroupSpecs"}  # fmt: skip
    assert cluster["enableInTreeAutoscaling"] is True
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert head["rayStartParams"] == {"num-cpus": "0"}
    for group in workers:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    images = set()
    for group in (head, *workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= set(container)
        assert container["resources"]["limits"] == container["resources"]["requests"]
        images.add(container["image"])
        for variable in container.get("env", []) + container.get("envFrom", []):
            assert "value" not in variable or not re.search("KEY|SECRET|TOKEN", variable["name"])
    assert len(images) == 1
    yaml.safe_load(spec["runtimeEnvYAML"])


def test_rayjob_manifest_s_entrypoint_is_understood(monkeypatch):
    python, dash, module, *options = shlex.split(manifest()["spec"]["entrypoint"])
    assert (python, dash) == ("python", "-m")
    verb = module.removeprefix("jobs.")
    summary, add, _ = cli.VERBS[verb]
    monkeypatch.setitem(cli.VERBS, verb, (summary, add, lambda args: 0))
    assert cli.main([verb, *options]) == 0
