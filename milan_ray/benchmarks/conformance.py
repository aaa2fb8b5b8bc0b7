"""Conformance: compares the maps read from layers with those of the network's own library, family by family.

``python -m jobs.models --conformance`` runs the smallest network of every family, untrained. The ground truth does not
use this project's reading of layers: it comes from torchvision's feature extractor, timm's ``forward_intermediates``
and transformers' ``output_hidden_states``. A layer that the library does not list (the hidden units of an MLP) is
compared through plain hooks; the order of its positions is taken from the tokens of a listed layer.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from milan_ray.benchmarks.conformance_truth import IMAGES, Subject, arranged, truths_of
from milan_ray.errors import MilanError, reason
from milan_ray.exemplars.forward import Forward
from milan_ray.models.hooks import call
from milan_ray.models.registry import ModelSpec

MOST_PARAMETERS = 150_000_000
"""Maximum number of parameters; larger timm networks are built with a depth of 2."""

MOST_LAYERS = 8
"""Maximum number of layers compared from the library's list, evenly spaced, in addition to all default layers."""

_TOLERANCE = 2e-4  # relative to a layer's largest value, for sums in another order
_LIT = 8  # a lit cell has an eighth of the image's height and width


@dataclass(frozen=True)
class Case:
    """A family, and a function that builds its smallest network.

    Attributes:
        library: ``torchvision``, ``timm`` or ``transformers``.
        family: The library's module or architecture.
        network: The network's name.
        build: Builds the network, or raises.
    """

    library: str
    family: str
    network: str
    build: Callable[[], Subject]


@dataclass
class Result:
    """Result for a family.

    Attributes:
        library: Library of the case.
        family: Family of the case.
        network: Network of the case.
        view: Height and width of the images, in pixels.
        built: Whether the network could be built.
        defaults: Number of default layers.
        defaults_run: Whether all of them can be read at once.
        compared: Number of layers whose maps equal the library's.
        lit: Number of layers without ground truth, where the response to a lit cell is at the right position.
        unproven: Number of layers without ground truth that have too few positions for a lit cell.
        refused: Layer → the error that rejects it; ``""`` stands for the network as a whole.
        wrong: Layer → what is wrong with its maps.
        seconds: Duration.
    """

    library: str
    family: str
    network: str
    view: tuple[int, int] = (0, 0)
    built: bool = True
    defaults: int = 0
    defaults_run: bool = False
    compared: int = 0
    lit: int = 0
    unproven: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """``right``, ``refused: …``, ``does not build: …`` or ``WRONG: …``."""
        if self.wrong:
            layer, what = next(iter(self.wrong.items()))
            more = f" (and {len(self.wrong) - 1} more layers)" if len(self.wrong) > 1 else ""
            return f"WRONG: {layer}: {what}{more}" if layer else f"WRONG: {what}"
        if not self.built:
            return f"does not build: {next(iter(self.refused.values()))}"
        if self.defaults_run and self.compared + self.lit:
            return "right"
        return f"refused: {next(iter(self.refused.values()), 'no layer could be compared')}"


def check(case: Case) -> Result:
    """Builds a family's network, compares its layers' maps with the ground truth, and returns the result."""
    result, start = Result(case.library, case.family, case.network), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _compare(case, result)
    finally:
        result.seconds = time.perf_counter() - start
        gc.collect()
    return result


def _compare(case: Case, result: Result) -> None:
    try:
        subject = case.build()
    except MilanError as error:
        result.refused[""] = str(error)
        return
    except Exception as error:  # libraries raise many types while they build a network
        result.built, result.refused[""] = False, reason(error)
        return
    spec, network = subject.spec, subject.network
    result.view = spec.preprocess.view.shape
    views = _pictures(spec.preprocess.view.shape)
    result.defaults = len(spec.layers)
    try:
        _vary(subject, views)
        raw, truths = truths_of(subject, views)
    except Exception as error:  # the library cannot run its own network
        result.built, result.refused[""] = False, f"its library does not run it: {reason(error)}"
        return
    result.defaults_run = _read(spec, network, spec.layers, result) is not None
    known = dict(truths)
    for layer in spec.layers:
        if layer not in known and layer in raw and (maps := arranged(network, layer, raw, truths)) is not None:
            known[layer] = maps
    del raw
    listed = _spaced([path for path in truths if "#" not in path], MOST_LAYERS)
    layers = tuple(dict.fromkeys([*spec.layers, *listed]))
    for forward, part in _forwards(spec, network, layers, result):
        _judge(forward, part, views, known, result)


def _read(spec: ModelSpec, network: nn.Module, layers: Sequence[str], result: Result) -> Forward | None:
    """Returns a forward pass of layers that can be read, or None after recording the error in the result."""
    name = layers[0] if len(layers) == 1 else ""
    try:
        forward = Forward(spec, network, layers, IMAGES)
        forward.maps(_pictures(spec.preprocess.view.shape))
        return forward
    except MilanError as error:
        result.refused[name] = str(error)
    except Exception as error:  # users would get this error instead of a clear message
        result.wrong[name] = f"no sentence, but {type(error).__name__}: {reason(error)}"
    return None


def _forwards(
    spec: ModelSpec, network: nn.Module, layers: Sequence[str], result: Result
) -> Iterator[tuple[Forward, Sequence[str]]]:
    """Yields one forward pass for all layers, or, if one layer is rejected, a forward pass for each."""
    noted = Result("", "", "")
    if (forward := _read(spec, network, layers, noted)) is not None:
        yield forward, layers
        return
    result.refused.pop("", None)
    result.wrong.pop("", None)
    for layer in layers:
        if (forward := _read(spec, network, (layer,), result)) is not None:
            yield forward, (layer,)
    if not result.refused and not result.wrong:  # each layer works alone, but not all together
        result.refused |= noted.refused
        result.wrong |= noted.wrong


def _judge(
    forward: Forward, layers: Sequence[str], views: np.ndarray, known: dict[str, torch.Tensor], result: Result
) -> None:
    """Compares maps with the ground truth and with those of permuted images; without ground truth, tests a lit cell."""
    maps = forward.maps(views)
    order = [2, 0, 1]
    exchanged = forward.maps(views[order])
    lit = None
    for layer in layers:
        own = maps[layer].float()
        size = own.abs().amax().clamp_min(1e-30)
        if (exchanged[layer].float() - own[order]).abs().amax() > 5 * _TOLERANCE * size:
            result.wrong[layer] = "an image's map depends on the other images of its batch"
            continue
        if layer in known:
            difference = _difference(own, known[layer].float())
            if difference is None:
                result.compared += 1
            else:
                result.wrong[layer] = difference
            continue
        if lit is None:
            lit = forward.maps(_cells(views.shape[1:3])), forward.maps(_cells(views.shape[1:3], lit=False))
        strayed = _strayed(lit[0][layer].float(), lit[1][layer].float())
        if strayed == "":
            result.unproven += 1
        elif strayed is None:
            result.lit += 1
        else:
            result.wrong[layer] = strayed


def _difference(own: torch.Tensor, truth: torch.Tensor) -> str | None:
    """Describes the difference between maps (n, U, h, w) as read and the ground truth; None if there is none."""
    if own.shape != truth.shape:
        differences = []
        if own.shape[1] != truth.shape[1]:
            differences.append(f"{own.shape[1]} units instead of {truth.shape[1]}")
        if own.shape[2:] != truth.shape[2:]:
            grids = ["×".join(map(str, maps.shape[2:])) for maps in (own, truth)]
            differences.append(f"a grid of {grids[0]} instead of {grids[1]}")
        return ", ".join(differences) or f"shape {tuple(own.shape)} instead of {tuple(truth.shape)}"
    size = truth.abs().amax().clamp_min(1e-30)
    if (own - truth).abs().amax() <= _TOLERANCE * size:
        return None
    positions = [maps.flatten(2).sort(dim=2).values for maps in (own, truth)]
    if (positions[0] - positions[1]).abs().amax() <= _TOLERANCE * size:
        return "positions in another order"
    units = [maps.sort(dim=1).values for maps in (own, truth)]
    if (units[0] - units[1]).abs().amax() <= _TOLERANCE * size:
        return "units in another order"
    strongest = [maps.flatten(2).amax(2).argmax(0) for maps in (own, truth)]
    share = (strongest[0] != strongest[1]).float().mean().item()
    return f"other values (the strongest image is another one for {share:.0%} of the units)"


def summary(results: Sequence[Result]) -> str:
    """Summarises the numbers of families, of wrong ones, and of those that run with their default layers, in a line."""
    built = [result for result in results if result.built]
    wrong, run = sum(bool(result.wrong) for result in built), sum(result.defaults_run for result in built)
    return (
        f"{len(built)} families of {len(results)} build; {wrong} wrong; {run} ({run / max(len(built), 1):.1%}) run "
        "with their default layers."
    )


def _versions() -> dict[str, str]:
    """Returns the versions of the installed libraries: library → version."""
    installed = {}
    for name in ("torch", "torchvision", "timm", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def to_row(result: Result) -> dict[str, Any]:
    """Converts a result to JSON, with library versions and the verdict; :func:`read_rows` reads it."""
    return {**asdict(result), "verdict": result.verdict, "versions": _versions()}


def read_rows(path: Path) -> list[Result]:
    """Reads results of an earlier run, a JSON object per line.

    Raises:
        MilanError: The file does not exist, holds something else, or holds results of other library versions.
    """
    names = {field.name for field in fields(Result)}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        results = [Result(**{name: value for name, value in row.items() if name in names}) for row in rows]
        versions = [row["versions"] for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MilanError(
            f"{path} does not hold results of `models --conformance --json` ({reason(error)}): make it again."
        ) from error
    other = next((made for made in versions if made != _versions()), None)
    if other is not None:
        raise MilanError(f"{path} holds results of {other}, where {_versions()} are installed: make it again.")
    return results


def page(results: Sequence[Result]) -> str:
    """Formats the results as a Markdown table, with the libraries' versions."""
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    lines = [
        "# Conformance",
        "",
        "<!-- Made by `python -m jobs.models --conformance --side 128 --out docs/conformance.md`: do not edit. -->",
        "",
        "```sh",
        "python -m jobs.models --conformance --side 128",
        "```",
        "",
        "What is read of a layer (units, positions, activations) against what the network's own library says, for the",
        "smallest network of every family, untrained, on the CPU: torchvision's feature extractor, timm's",
        "`forward_intermediates`, transformers' `output_hidden_states`. Pictures are also exchanged within a batch.",
        "*Compared* are layers with such a truth; *lit* are others, where a lit cell of a grey picture answers there;",
        "*unproven* are others of fewer than 4 × 4 positions. A detector is its backbone.",
        "",
        f"{versions}. {summary(results)}",
        "",
        "| library | family | network | pictures | default layers | compared | lit | unproven | result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        run = f"{result.defaults} run" if result.defaults_run else "do not run"
        verdict = result.verdict.replace("|", "\\|").replace("\n", " ")
        pictures = "×".join(map(str, result.view)) if any(result.view) else "-"
        network, counts = f"`{result.network}`", (result.compared, result.lit, result.unproven)
        cells = (result.library, result.family, network, pictures, run, *counts, verdict)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


# Images -----------------------------------------------------------------------------------------------------------


def _pictures(shape: tuple[int, int]) -> np.ndarray:
    """Generates smooth random images with fine noise, uint8 (n, H, W, 3)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((IMAGES, 3, 6, 6), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=shape, mode="bicubic", align_corners=False)
    noisy = smooth + 0.1 * torch.randn((IMAGES, 3, *shape), generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


_PLACES = ((1, 5), (5, 2), (6, 6))  # positions of lit cells, in eighths of height and width


def _cells(shape: Sequence[int], lit: bool = True) -> np.ndarray:
    """Generates grey images, each with one lit cell, or with none."""
    height, width = shape
    views = np.full((IMAGES, height, width, 3), 127, np.uint8)
    for number, (row, column) in enumerate(_PLACES if lit else ()):
        top, left = row * height // _LIT, column * width // _LIT
        views[number, top : top + height // _LIT, left : left + width // _LIT] = (255, 230, 10)
    return views


def _strayed(lit: torch.Tensor, grey: torch.Tensor) -> str | None:
    """Describes a misplaced response to a lit cell; None if it is right, "" if there are too few positions to tell."""
    height, width = lit.shape[2:]
    if min(height, width) < 4:
        return ""
    change = (lit - grey).abs()
    answer = (change / change.amax(dim=(0, 2, 3), keepdim=True).clamp_min(1e-30)).sum(1)
    for number, (row, column) in enumerate(_PLACES):
        peak = divmod(int(answer[number].argmax()), width)
        at = ((peak[0] + 0.5) / height, (peak[1] + 0.5) / width)
        meant = ((row + 0.5) / _LIT, (column + 0.5) / _LIT)
        slack = (0.5 / _LIT + 1 / height, 0.5 / _LIT + 1 / width)
        if any(abs(a - b) > c for a, b, c in zip(at, meant, slack, strict=True)):
            return (
                f"a cell lit at {meant[0]:.0%} of the height and {meant[1]:.0%} of the width answers at {at[0]:.0%} "
                f"and {at[1]:.0%}"
            )
    return None


@torch.no_grad()
def _vary(subject: Subject, views: np.ndarray) -> None:
    """Perturbs an untrained network, because initial values switch off whole branches.

    Gains and biases are moved away from 0 and 1, and batch norms get the statistics of some images.
    """
    generator, network = torch.Generator().manual_seed(2), subject.network
    for parameter in network.parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            parameter.add_(torch.empty_like(parameter).uniform_(0.05, 0.3, generator=generator))
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1  # statistics of this batch only
    try:
        call(network, subject.spec.prepare(torch.from_numpy(views)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum


def _spaced(items: list[str], most: int) -> list[str]:
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
