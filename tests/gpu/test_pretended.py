"""The pretended GPU catches every kind of wait and of mixed devices, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pretended import CUDA, HostWaits, PretendedCuda
from torch import nn

from milan_ray.device import to_device


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=CUDA)


WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: on_gpu(1).item(),
    "tolist": lambda: on_gpu(3).tolist(),
    "bool": lambda: bool((on_gpu(3) > 0).any()),
    "cpu": lambda: on_gpu(3).cpu(),
    "to cpu": lambda: on_gpu(3).to("cpu", torch.float64),
    "copy to the host": lambda: torch.zeros(3).copy_(on_gpu(3)),
    "nonzero": lambda: on_gpu(3).nonzero(),
    "unique": lambda: on_gpu(3).unique(),
    "mask": lambda: on_gpu(3)[on_gpu(3) > 0],
    "numpy to the GPU": lambda: torch.from_numpy(np.zeros(3)).to(CUDA),
    "list to the GPU": lambda: torch.tensor([1.0, 2.0], device=CUDA),
    "pinned, but blocking": lambda: torch.zeros(3).pin_memory().to(CUDA),
    "not pinned": lambda: torch.zeros(3).to(CUDA, non_blocking=True),
    "copy from the host": lambda: on_gpu(3).copy_(torch.zeros(3)),
    "index on the host": lambda: on_gpu(3)[torch.tensor([0, 1])],
    "list as index": lambda: on_gpu(3)[[0, 1]],
}


@pytest.mark.parametrize("name", WAITS)
def test_pretended_gpu_fails_where_the_host_would_wait(name: str) -> None:
    with PretendedCuda(), pytest.raises(HostWaits):
        WAITS[name]()


@pytest.mark.parametrize(
    "function", [lambda: on_gpu(3) + torch.zeros(3), lambda: torch.cat([on_gpu(3), torch.zeros(3)])]
)
def test_pretended_gpu_fails_where_devices_are_mixed(function: Callable[[], object]) -> None:
    with PretendedCuda(), pytest.raises(RuntimeError, match="device"):
        function()


def test_pretended_gpu_lets_kernels_numbers_and_pinned_copies_pass_and_keeps_the_host_real() -> None:
    with PretendedCuda() as gpu:
        values = on_gpu(3, 4)
        values[:, 0] = 1.0
        assert (values * 2 + torch.tensor(3.0)).is_cuda and (values > 0).any().is_cuda
        assert to_device(torch.from_numpy(np.arange(3.0)), CUDA).is_cuda
        assert to_device(values, CUDA) is values
        assert torch.from_numpy(np.arange(3)).sum().item() == 3
        assert gpu.network(nn.Linear(4, 2))(values).shape == (3, 2)


def test_pretended_gpu_allows_as_many_reads_as_it_is_told() -> None:
    with PretendedCuda(reads=2) as gpu:
        assert on_gpu(3).cpu().numpy().tolist() == [0, 0, 0]
        assert on_gpu(1).item() == 0 and gpu.reads_left == 0
        with pytest.raises(HostWaits):
            on_gpu(3).cpu()


def test_pretended_backward_fills_the_gradients_that_torchs_engine_fills() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4))
    inputs = torch.randn(5, 3)
    gradients = []
    for mode in (PretendedCuda(), None):
        network.zero_grad()
        loss = (network(inputs) * network[0](inputs)).square().mean()
        if mode is None:
            loss.backward()
        else:
            with mode:  # on the host, tensors are real
                loss.backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


def test_to_device_leaves_tensors_of_the_host_alone() -> None:
    tensor = torch.zeros(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
