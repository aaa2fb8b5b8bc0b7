"""Checks that an image's values depend neither on the other images in the batch nor on its place in the batch.

There are two comparisons. An image that keeps its place in a batch of the same size goes through the same kernels, so
its values must be equal to the bit, whatever the other images are; :func:`exactly` allows for networks that route
images or tokens to experts, whose kernels then process other sizes. An image in another place, or in a batch of another
size, may go through other kernels that sum in another order; :func:`about` allows for that.

Both comparisons are made for each unit separately, relative to the spread of its values between images, so that a unit
with large values does not hide a difference in another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Inputs = np.ndarray | tuple[torch.Tensor, ...]
"""Views uint8 (n, H, W, bands), or a generator's latents, each (n, …)."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference of values that should be equal: the sum of two terms.

    Attributes:
        spread: First term, as a share of the spread of values between images.
        steps: Second term, in steps of the number type, relative to the size of the values.
        step: The number type's step: the difference between 1 and the next number.
    """

    spread: float
    steps: float
    step: float


_EXACTLY = {torch.float64: (1e-6, 8), torch.float32: (1e-4, 8)}
_ABOUT = {torch.float64: (1e-4, 64), torch.float32: (1e-3, 64)}
_HALF_EXACTLY, _HALF_ABOUT = (0.02, 4), (0.2, 16)
_TF32 = 0.02  # convolutions on NVIDIA GPUs may or may not round to 10 bits, depending on the batch size


def exactly(dtype: torch.dtype) -> Tolerance:
    """The tolerance for images that keep their place, by the type that the network computes in."""
    return Tolerance(*_EXACTLY.get(dtype, _HALF_EXACTLY), torch.finfo(dtype).eps)


def about(dtype: torch.dtype, device: torch.device) -> Tolerance:
    """The tolerance for images in other places, or in batches of other sizes."""
    spread, steps = _ABOUT.get(dtype, _HALF_ABOUT)
    if device.type == "cuda" and dtype == torch.float32:
        spread = _TF32
    return Tolerance(spread, steps, torch.finfo(dtype).eps)


def agree(one: torch.Tensor, other: torch.Tensor, known: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether two sets of values of the same images agree.

    Args:
        one: The values, (n, …), images first.
        other: The values again, in the same order.
        known: Values of several images, (m, …); the spread between images is measured on these.
        tolerance: Allowed difference, along each axis but the first (one of them counts the units).
    """
    if one.shape != other.shape:
        return False
    one, other, known = (_finite(values) for values in (one, other, known))
    apart = (one - other).square()
    spread, size = (known - known.mean(0, keepdim=True)).square(), known.square()
    for axis in range(1, one.ndim) if one.ndim > 1 else [0]:
        rest = [number for number in range(one.ndim) if number != axis] if one.ndim > 1 else [0]
        far, between, large = (values.mean(rest).sqrt() for values in (apart, spread, size))
        usual = large[large > 0].median() if bool((large > 0).any()) else large.new_zeros(())
        allowed = tolerance.spread * between + tolerance.steps * tolerance.step * (large + usual)
        if bool((far > allowed).any()):
            return False
    return True


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)


def dimmed(pictures: np.ndarray) -> np.ndarray:
    """Lowers the contrast of all pictures but the last, which reveals values that depend on the batch's extremes.

    Args:
        pictures: uint8 (n, H, W, bands).
    """
    dim = pictures[:-1] // 4 + np.array(96, pictures.dtype)
    return np.concatenate([dim, pictures[-1:]])


@dataclass(frozen=True)
class Exchange:
    """A second batch that repeats some images of a first one, in the same or in other places, among other images.

    Attributes:
        inputs: The second batch.
        kept: Rows with the same image in both batches.
        moved: Rows of the first batch whose images have other places in the second.
        to: These places.
    """

    inputs: Inputs
    kept: tuple[int, ...]
    moved: tuple[int, ...]
    to: tuple[int, ...]


def exchanged(inputs: Inputs, size: int) -> Exchange:
    """Makes a second batch with half of the images of a first one.

    A quarter of the images stays in place, and a quarter moves. The other rows, the first one among them, are black or
    noise, and so are the rows that fill up the batch.

    Args:
        inputs: The first batch, n ≤ size images.
        size: Images per forward pass.
    """
    count = len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)
    others = [int(row) for row in np.random.default_rng(0).permutation(count - 1) + 1] if count > 1 else []
    kept = tuple(others[: -(-count // 4)]) or (0,)
    moved = tuple(others[len(kept) : len(kept) + count // 4])
    to = tuple(sorted(set(range(count)) - {*kept, *moved}))[: len(moved)]
    strange = sorted(set(range(size)) - {*kept, *to})

    def mixed(part: torch.Tensor) -> torch.Tensor:
        batch = part.new_zeros((size, *part.shape[1:]))
        batch[[*kept, *to]] = part[[*kept, *moved]]
        random = torch.Generator().manual_seed(0)
        for row in strange[::2]:
            if part.dtype == torch.uint8:
                batch[row] = torch.randint(0, 2, part.shape[1:], generator=random).to(torch.uint8) * 255
            elif part.is_floating_point():
                batch[row] = -part[0]
        return batch

    if isinstance(inputs, tuple):
        return Exchange(tuple(map(mixed, inputs)), kept, moved, to)
    return Exchange(mixed(torch.from_numpy(inputs)).numpy(), kept, moved, to)


def summary(maps: torch.Tensor) -> torch.Tensor:
    """Numbers per image and unit that change with any value: the maximum, the mean, and a sum with random signs.

    Args:
        maps: (B, U, h, w).

    Returns:
        float64 (B, U · 3) on the CPU, or (B, U) for units without positions.
    """
    values = maps.flatten(2).float()
    if values.shape[2] == 1:
        return values[:, :, 0].double().cpu()
    signs = torch.randint(0, 2, values.shape[2:], generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs = signs.to(values.device) / values.shape[2] ** 0.5
    return torch.cat([values.amax(2), values.mean(2), (values * signs).sum(2)], 1).double().cpu()


def differing(
    first: torch.Tensor, second: torch.Tensor, exchange: Exchange, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether images have other values in the second batch.

    Args:
        first: The :func:`summary` of the first batch.
        second: The :func:`summary` of the second batch.
        exchange: Which images are repeated, and where.
        dtype: The type that the network computes in.
        device: The network's device.
    """
    kept, moved, to = (list(rows) for rows in (exchange.kept, exchange.moved, exchange.to))
    return not (
        agree(first[kept], second[kept], first, exactly(dtype))
        and (not moved or agree(first[moved], second[to], first, about(dtype, device)))
    )
