"""A pretended GPU: code for CUDA runs on any machine, without data, and fails where the host would wait.

Tensors on the pretended GPU have a shape, a type and a device, and no values (``torch._subclasses.fake_tensor``);
tensors on the host are real. Inside :class:`PretendedCuda` an operation fails

- if it mixes devices,
- if the host asks for a value (``.item()``, ``.tolist()``, ``bool(tensor.any())``) or for a size that depends on
  values (``nonzero``, ``unique``, indexing with a mask),
- if it copies to the host; or to the GPU from memory that is not pinned, or without ``non_blocking``: such a copy first
  waits until the GPU has done everything that it was given before. An index on the host is such a copy, too.

What it cannot show: the GPU's numbers, its speed, and waits inside of CUDA's libraries. ``jobs.benchmark gpu`` shows
these on a real GPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

CUDA = torch.device("cuda", 0)

aten = torch.ops.aten

_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

Network = TypeVar("Network", bound=nn.Module)


class HostWaits(AssertionError):
    """The host would wait for the GPU."""


class _Watch(TorchDispatchMode):
    """Fails where the host would wait; keeps track of which tensors are pinned, and of copies to the host."""

    def __init__(self, reads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types here
        self.reads = reads
        self._pinned = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not to_gpu and not any(isinstance(leaf, FakeTensor) for leaf in tree_iter((args, kwargs))):
            with unset_fake_temporarily():
                return self._on_host(func, args, kwargs)
        if func is aten._to_copy.default and "device" in kwargs and args[0].is_cuda != to_gpu:
            if not to_gpu:
                return self._read(args[0], kwargs.get("dtype"))
            self._sent(args[0], kwargs.get("non_blocking"))
        if func is aten.copy_.default and args[0].is_cuda != args[1].is_cuda:
            if not args[0].is_cuda:
                return args[0].copy_(self._read(args[1], None))
            self._sent(args[1], (*args, False)[2])
        if func is aten._local_scalar_dense.default and self.reads > 0:
            zero = self._read(args[0], None)
            with unset_fake_temporarily():
                return zero.item()
        if func in _INDEXING and args[0].is_cuda:
            for index in args[1]:
                if index is not None and not index.is_cuda:
                    self._sent(index, False)
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaits(f"{func} asks the GPU for values") from error

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation on real tensors; without a GPU there is no pinned memory, so it is only noted."""
        if func is aten.is_pinned.default:
            return args[0] in self._pinned
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            self._pinned[pinned] = True
            return pinned
        return func(*args, **kwargs)

    def _read(self, source: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """A copy to the host, of which only a given number may happen: real zeros."""
        self.reads -= 1
        if self.reads < 0:
            raise HostWaits(f"a tensor {tuple(source.shape)} is copied to the host")
        with unset_fake_temporarily():
            return torch.zeros(source.shape, dtype=dtype or source.dtype)

    def _sent(self, source: torch.Tensor, non_blocking: bool | None) -> None:
        """A copy from the host. A number (0 axes) is passed with the kernel that takes it."""
        if source.ndim and not (non_blocking and source in self._pinned):
            raise HostWaits(f"a tensor {tuple(source.shape)} is copied to the GPU from memory that is not pinned")


class PretendedCuda:
    """Context in which the device ``cuda`` exists, without values; see the module's docstring.

    Args:
        reads: How many copies to the host may happen; they hold zeros. One more fails.

    Raises:
        HostWaits: The host would wait for the GPU.
        RuntimeError: An operation mixes devices.
    """

    def __init__(self, reads: int = 0) -> None:
        self._fake, self._watch = FakeTensorMode(allow_non_fake_inputs=True), _Watch(reads)

    @property
    def reads_left(self) -> int:
        """How many copies to the host may still happen."""
        return self._watch.reads

    def __enter__(self) -> PretendedCuda:
        self._stack = ExitStack()
        # cuDNN, which is there in a build for CUDA, would ask the driver for its device.
        self._stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        self._stack.enter_context(patch.object(torch.Tensor, "backward", _backward))
        # In inference mode, operations arrive here that consist of others, which are what can be judged.
        self._stack.enter_context(
            patch.object(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))
        )
        self._stack.enter_context(self._fake)
        self._stack.enter_context(self._watch)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def network(self, network: Network) -> Network:
        """The network with its parameters and buffers on the pretended GPU, changed in place."""
        moved: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in moved:
                on_gpu = torch.empty_like(tensor, device=CUDA, requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(on_gpu, tensor.requires_grad) if is_parameter else on_gpu
            return moved[id(tensor)]

        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(module, name, move(parameter))
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = move(buffer)
        return network


@torch.no_grad()
def _backward(loss: torch.Tensor) -> None:
    """``loss.backward()``: runs the nodes of the graph. Torch's engine would ask the driver for streams."""
    order: list[Any] = []
    visited: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node is not None and node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions]
    gradients: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        given = gradients.pop(node, {})
        results = node(*[given.get(place) for place in range(len(node._input_metadata))])
        for (after, place), result in zip(
            node.next_functions, results if isinstance(results, tuple) else (results,), strict=False
        ):
            if after is not None and result is not None:
                result = result.sum_to_size(after._input_metadata[place].shape)
                earlier = gradients.setdefault(after, {}).get(place)
                gradients[after][place] = result if earlier is None else earlier + result
