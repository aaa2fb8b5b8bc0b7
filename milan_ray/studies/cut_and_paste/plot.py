"""Figure of cut-and-paste adversarial images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from milan_ray.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Example:
    """A row of the figure.

    Attributes:
        unit: The unit, with its description and its classes.
        titles: Titles of the three images.
        images: The original, the exemplar that is cut from, and the result, uint8 (H, W, 3).
        cut: What is cut out of the exemplar, bool (H, W).
    """

    unit: str
    titles: tuple[str, str, str]
    images: tuple[np.ndarray, np.ndarray, np.ndarray]
    cut: np.ndarray


def plot_examples(model: str, examples: Sequence[Example]) -> Figure:
    """Plots the paper's Figure 14 with a network's units: what was pasted, on what, and the answer to it."""
    figure = new_figure(7.2, 2.5 * len(examples) + 0.5)
    panels = figure.subplots(len(examples), 3, squeeze=False)
    for axes, example in zip(panels, examples, strict=True):
        for place, image, title in zip(axes, example.images, example.titles, strict=True):
            place.imshow(image)
            place.set_title(title, fontsize="small")
            place.set(xticks=[], yticks=[])
        axes[1].contour(example.cut, [0.5], colors="red", linewidths=0.8)
        axes[0].set_ylabel(example.unit, fontsize="x-small", rotation=0, ha="right", va="center")
    figure.suptitle(f"{model}: what a unit fires at, pasted where it does not belong", fontsize="small")
    return figure
