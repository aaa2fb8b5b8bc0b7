"""Demand for one more CPU, as an autoscaler sees it."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from gates import wait_until
from ray.autoscaler.v2.sdk import get_cluster_status

from milan_ray.engine.cluster import cluster_resources
from milan_ray.engine.demand import one_more_cpu


def wanted() -> list[dict[str, float]]:
    """What the tasks and actors that wait for resources ask for, as the autoscaler is told."""
    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
    return [request.bundle for demand in demands for request in demand.bundles_by_count]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_one_more_cpu_is_asked_for_while_all_are_taken_and_no_longer():
    class Busy:
        def there(self) -> bool:
            return True

    busy: Any = ray.remote(num_cpus=cluster_resources()["CPU"])(Busy).remote()
    assert ray.get(busy.there.remote())
    wait_until(lambda: not wanted(), "nothing is asked for")
    with one_more_cpu():
        assert wait_until(wanted, "a CPU is asked for") == [{"CPU": 1.0}]
    wait_until(lambda: not wanted(), "nothing is asked for")
    ray.kill(busy)
