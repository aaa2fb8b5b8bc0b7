"""The linear head of a classifier: finds it, collects its inputs, and fine-tunes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation, UnitSet
from milan_ray.models.hooks import call, first_tensor, hooked
from milan_ray.models.registry import ModelSpec


@dataclass(frozen=True)
class HeadTraining:
    """How a classifier's last layer is fine-tuned; the defaults are the reference's.

    Attributes:
        lr: Learning rate of AdamW.
        max_epochs: Maximum number of epochs.
        patience: Number of epochs without a lower loss on the held-out images that is tolerated; one more stops it.
        hold_out: Share of the images that is held out.
        batch_size: Images per step.
        seed: Seed of the split and the order.
    """

    lr: float = 1e-4
    max_epochs: int = 100
    patience: int = 4
    hold_out: float = 0.1
    batch_size: int = 128
    seed: int = 0


@torch.inference_mode()
def find_head(spec: ModelSpec, model: nn.Module, views: torch.Tensor) -> str:
    """Finds the path of the linear map whose output is the model's output.

    Args:
        spec: The model.
        model: The model, built, in eval mode.
        views: uint8 (n, H, W, 3), one or more of its views.

    Raises:
        MilanError: The model does not end in a linear map.
    """
    outputs: dict[str, object] = {}
    handles = (
        module.register_forward_hook(lambda _, __, output, path=path: outputs.update({path: output}))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    with hooked(handles):
        logits = first_tensor(call(model, spec.prepare(views[:1])))
    for path, output in outputs.items():
        if isinstance(output, torch.Tensor) and logits is not None and torch.equal(output, logits):
            return path
    raise MilanError(
        f"{spec.name} does not end in a linear map, whose weights would say which unit supports which class."
    )


@torch.no_grad()
def head_inputs(
    spec: ModelSpec, model: nn.Module, head: str, units: UnitSet, views: torch.Tensor, rows: int = 128
) -> torch.Tensor:
    """Collects the inputs of a classifier's last layer with some units switched off.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        head: As returned by :func:`find_head`.
        units: Layer → units that are switched off.
        views: uint8 (n, H, W, 3).
        rows: Views per pass.

    Returns:
        float32 (n, inputs of the head), on the CPU.
    """
    passes: list[torch.Tensor] = []
    ablation = Ablation(spec, model, [units])
    inputs = []
    with model.get_submodule(head).register_forward_pre_hook(lambda _, args: passes.append(args[0])):
        for some in views.split(rows):
            ablation.logits(some)
            inputs.append(passes[-1].float().cpu())  # an ablation's first pass is a trial
            passes.clear()
    return torch.cat(inputs)  # a copy: unlike tensors of inference mode, it supports gradients


def fit_head(
    inputs: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: HeadTraining
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fine-tunes a last layer on its inputs; the rest of the network stays unchanged.

    Keeps the weights of the epoch with the lowest loss on the held-out images (the reference keeps the last ones), or
    the initial weights where no epoch is better.

    Args:
        inputs: float32 (n, D).
        labels: int64 (n,).
        weight: float32 (classes, D), the initial weight.
        bias: float32 (classes,), the initial bias, or None.
        config: Settings of the training.

    Returns:
        Weight and bias, new tensors.
    """
    random = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(inputs), generator=random)
    held = max(1, round(config.hold_out * len(inputs)))
    test, train = order[:held], order[held:]
    tuned: list[torch.Tensor] = [weight.detach().clone().requires_grad_()]
    if bias is not None:
        tuned.append(bias.detach().clone().requires_grad_())
    optimizer = torch.optim.AdamW(tuned, lr=config.lr)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(inputs[rows], *tuned), labels[rows])

    with torch.no_grad():
        lowest = float(loss(test))
    best, waited = [tensor.detach().clone() for tensor in tuned], 0
    for _ in range(config.max_epochs):
        for rows in train[torch.randperm(len(train), generator=random)].split(config.batch_size):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
        with torch.no_grad():
            now = float(loss(test))
        if now < lowest:
            lowest, best, waited = now, [tensor.detach().clone() for tensor in tuned], 0
        else:
            waited += 1
            if waited > config.patience:
                break
    return best[0], best[1] if bias is not None else None


def strongest_classes(weight: torch.Tensor, unit: int, count: int) -> Sequence[int]:
    """The classes that a unit of the layer below the head supports most, by the weight of its connection.

    Args:
        weight: (classes, units).
        unit: The unit's index.
        count: Number of classes.
    """
    classes: list[int] = weight[:, unit].topk(min(count, len(weight))).indices.tolist()
    return classes
