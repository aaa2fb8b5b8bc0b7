"""Switches units off in a network's weights, so that the edited network needs no hooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation, UnitSet, directions, spanned
from milan_ray.models.hooks import find_layers, is_activation
from milan_ray.models.registry import ModelSpec

Weighted = (nn.Linear, nn.modules.conv._ConvNd)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd

_KEEPING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LeakyReLU, nn.ELU, nn.Hardswish,
)  # fmt: skip
_KEEPING_FUNCTIONS = (
    torch.relu, F.relu, F.gelu, F.silu, torch.tanh, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, F.dropout, torch.max_pool2d,
)  # fmt: skip
_LINEAR_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
_LINEAR_FUNCTIONS = (F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, torch.flatten, torch.mean)
_KEEPING_METHODS = ("relu", "tanh", "contiguous", "clone")


def edited(spec: ModelSpec, model: nn.Module, units: UnitSet, views: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of a network with some units switched off.

    Where a layer ends in a convolution, linear map or batch normalisation, the rows that compute the unit are set to
    zero. Where it ends in something else (such as the sum of a residual block), the columns that read the unit are set
    to zero in all following convolutions and linear maps. For features, such rows or columns are projected off their
    directions, where only linear operations stand between. Before the weights are returned, a check on images confirms
    that this has the same effect as switching the units off.

    Args:
        spec: The model.
        model: The model, built, in eval mode. It is not changed.
        units: Layer → units to switch off.
        views: uint8 (n, H, W, 3), a few of the model's views for the check.

    Returns:
        State dict, as ``model.state_dict()``, of new tensors.

    Raises:
        MilanError: A layer's units cannot be switched off in the weights.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, numbers in units.items():
        if layer in spec.features:
            _project(spec, model, layer, numbers, state)
            continue
        maker = _maker(model, layer)
        if maker is not None:
            for part in ("weight", "bias"):
                if f"{maker}.{part}" in state:
                    _outputs_first(state[f"{maker}.{part}"], model.get_submodule(maker))[list(numbers)] = 0
            continue
        for name in _readers(model, layer):
            _outputs_first(state[f"{name}.weight"], model.get_submodule(name))[:, list(numbers)] = 0
    _check(spec, model, units, state, views)
    return state


def _project(
    spec: ModelSpec, model: nn.Module, layer: str, features: Sequence[int], state: dict[str, torch.Tensor]
) -> None:
    """Projects directions of features out of what makes their layer's output, or else out of what reads it."""
    basis = spanned(directions(spec, layer)[list(features)])
    base = spec.base(layer)

    def off(rows: torch.Tensor) -> torch.Tensor:  # (C, …)
        span = basis.to(rows)
        return rows - (span @ (span.T @ rows.flatten(1))).view_as(rows)

    module, path = find_layers(model, [base])[base], base
    while isinstance(module, nn.Sequential) and len(module):
        name, module = list(module.named_children())[-1]
        path = f"{path}.{name}"
    if isinstance(module, Weighted):
        for part in ("weight", "bias"):
            if f"{path}.{part}" in state:
                rows = _outputs_first(state[f"{path}.{part}"], module)
                rows.copy_(off(rows[:, None])[:, 0] if rows.ndim == 1 else off(rows))
        return
    for name in _readers(model, base, linearly=True):
        columns = _outputs_first(state[f"{name}.weight"], model.get_submodule(name)).movedim(1, 0)
        if len(columns) != len(basis):
            raise MilanError(
                f"features of layer {base!r} cannot be switched off in the weights: {name} reads {len(columns)} "
                f"numbers of its {len(basis)} units; choose a later layer."
            )
        columns.copy_(off(columns))


def _outputs_first(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A view of a weight or bias with the module's outputs on the first axis."""
    return tensor.movedim(1, 0) if isinstance(module, _TRANSPOSED) and tensor.ndim > 1 else tensor


def _maker(model: nn.Module, layer: str) -> str | None:
    """The module whose rows compute a layer's units; None where the layer does not end in such a module."""
    module, path = find_layers(model, [layer])[layer], layer
    while isinstance(module, nn.Sequential) and len(module):
        names = [name for name, child in module.named_children() if not is_activation(child)]
        if not names:
            return None
        path, module = f"{path}.{names[-1]}", module.get_submodule(names[-1])
    able = isinstance(module, (*Weighted, nn.modules.batchnorm._BatchNorm))
    return path if able and getattr(module, "weight", None) is not None else None


def _readers(model: nn.Module, layer: str, linearly: bool = False) -> list[str]:
    """The convolutions and linear maps that read a layer's output, also through operations that preserve zeros.

    Args:
        model: The network.
        layer: The layer.
        linearly: Whether only linear operations may stand between, which preserve directions.

    Raises:
        MilanError: Something else reads it, or the network cannot be traced.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name == layer or super().is_leaf_module(m, module_qualified_name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:  # torch.fx may raise anything where it cannot trace the network's code
        raise MilanError(
            f"layer {layer!r} cannot be switched off in the weights: torch.fx cannot trace the network ({error})."
        ) from error
    start = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    waiting = [user for node in start for user in node.users]
    readers: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Weighted):
            readers[str(node.target)] = None
        elif _keeps_units(node, module) and not (linearly and _bends(node, module)):
            waiting += list(node.users)
        else:
            raise MilanError(
                f"layer {layer!r} cannot be switched off in the weights: {node.name} reads it, which is "
                f"{'not linear' if linearly else 'no convolution or linear map'}; choose a layer before it."
            )
    if not readers:
        raise MilanError(f"layer {layer!r} cannot be switched off in the weights: no weights make or read it.")
    return list(readers)


def _keeps_units(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the operation preserves zeroed units and their order."""
    if module is not None:
        return isinstance(module, _KEEPING_MODULES) or (isinstance(module, nn.Flatten) and module.start_dim == 1)
    if node.op == "call_function":
        if node.target is torch.flatten:
            return bool((*node.args[1:], node.kwargs.get("start_dim"))[0] == 1)
        return node.target in _KEEPING_FUNCTIONS or (node.target is torch.mean and _over_positions(node))
    if node.op == "call_method":
        if node.target == "mean":
            return _over_positions(node)
        return node.target in _KEEPING_METHODS
    return False


def _bends(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation that preserves zeroed units is not linear."""
    if module is not None:
        return not isinstance(module, _LINEAR_MODULES)
    if node.op == "call_function":
        return node.target not in _LINEAR_FUNCTIONS
    return node.target in ("relu", "tanh")


def _over_positions(node: fx.Node) -> bool:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(dims, (tuple, list)) and all(dim in (2, 3, -1, -2) for dim in dims)


@torch.inference_mode()
def _check(
    spec: ModelSpec, model: nn.Module, units: UnitSet, state: dict[str, torch.Tensor], views: torch.Tensor
) -> None:
    """Checks that the edited weights have the same effect as switching units off.

    Raises:
        MilanError: The effect differs.
    """
    wanted = Ablation(spec, model, [units]).logits(views)[0]
    logits = torch.func.functional_call(model, state, (spec.prepare(views),))
    if not torch.allclose(logits.float().cpu(), wanted, rtol=1e-3, atol=1e-4):
        layers = ", ".join(repr(layer) for layer in units)
        raise MilanError(
            f"units of {layers} cannot be switched off in the weights: the edited network puts out something else than "
            "the one with these units at zero; choose other layers."
        )
