"""Units whose exemplars or masks mean nothing, because their highest activation is reached too often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Ties:
    """What the exemplars and levels of U units prove, each bool (U,).

    Attributes:
        dead: No activation is above 0, though 0 is reached: the unit is never active.
        tied: All k exemplars have the highest activation, so that they are the first such images by id.
        flat: No activation is above the level. Masks are then empty, or the rounding of an interpolation.
        few: The level is the highest activation whatever the activations are, because there are too few.
        k: Exemplars per unit.
    """

    dead: np.ndarray
    tied: np.ndarray
    flat: np.ndarray
    few: np.ndarray
    k: int

    @property
    def doubtful(self) -> np.ndarray:
        """Bool (U,): units whose exemplars or masks mean nothing."""
        return np.asarray(self.tied | self.flat)

    def of_unit(self, place: int) -> tuple[str, str] | None:
        """What readers should know of a unit: a name for it and the facts; None where there is nothing to know."""
        if not self.doubtful[place]:
            return None
        because = ", because so few were counted" if self.few[place] else ""
        clauses = [
            (self.dead[place], "never active (no activation is above 0)"),
            (self.tied[place], f"{self.k} images or more have the highest activation, and these are the first"),
            (self.flat[place], f"no activation is above the level{because}, so masks show nothing"),
        ]
        name = "exemplars tie" if self.tied[place] else "masks show nothing"
        return name, "; ".join(words for holds, words in clauses if holds)

    def in_words(self) -> str:
        """The end of a warning about a layer; empty if the exemplars and masks of all units mean something."""
        dead, few = int(np.sum(self.dead)), int(np.sum(self.few & ~self.dead))
        tied, flat = int(np.sum(self.tied & ~self.dead)), int(np.sum(self.flat & ~self.few & ~self.dead))
        if not self.doubtful.any():
            return ""
        clauses = [
            (dead, "never active (no activation is above 0)"),
            (tied, f"with their highest activation on {self.k} images or more, of which the first are shown"),
            (flat, "without an activation above their level, so that masks show nothing"),
            (few, "with too few activations for a level below the highest, so that masks show nothing"),
        ]
        said = "; ".join(f"{count} {words}" for count, words in clauses if count)
        remedies = [
            (dead or tied or flat, "dissect another layer"),
            (tied or flat, "the module in front of its activation function with --activations pre"),
            (dead or few, "take more images"),
            (few, "lower the quantile"),
        ]
        remedy = ", or ".join(words for holds, words in remedies if holds)
        units = f"{int(np.sum(self.doubtful))} of {len(self.tied)} units"
        return f"has {units} whose exemplars or masks mean nothing: {said}; {remedy}"


def find_ties(topk: np.ndarray, levels: np.ndarray, positions: np.ndarray, quantile: float) -> Ties:
    """Finds units whose exemplars or masks mean nothing.

    Args:
        topk: float32 (U, k), activations of the exemplars, highest first; −inf or NaN where there are fewer.
        levels: float32 (U,), NaN where unknown.
        positions: int (U,), activations counted per unit.
        quantile: Which quantile the levels are.
    """
    highest, k = topk[:, 0], topk.shape[1]
    # One image is no tie. With fewer images than k, all are exemplars, and none was chosen.
    tied = np.isfinite(highest) & (topk[:, -1] == highest) & (k > 1)
    flat = np.isfinite(highest) & (levels >= highest)
    few = flat & (quantile * positions - 0.5 >= positions - 1)  # Hazen's place of the quantile is the last
    return Ties((highest == 0) & (tied | (flat & ~few)), tied, flat, few, k)


def ties_of_tables(exemplars: pa.Table, levels: pa.Table, metadata: Mapping[str, str]) -> Ties:
    """Finds them in the tables of a layer.

    Args:
        exemplars: Columns unit, rank and activation.
        levels: Columns unit, level and positions; empty where there are none, as of published sets.
        metadata: The exemplars'.

    Returns:
        Of the units of both tables, ascending.
    """
    unit, rank = (exemplars[name].to_numpy() for name in ("unit", "rank"))
    k = max(int(metadata.get("k", 1)), int(rank.max(initial=0)) + 1)
    units = np.union1d(unit, levels["unit"].to_numpy())
    topk = np.full((len(units), k), -np.inf, np.float32)
    topk[np.searchsorted(units, unit), rank] = exemplars["activation"].to_numpy()
    known, positions = np.full(len(units), np.nan, np.float32), np.zeros(len(units), np.int64)
    place = np.searchsorted(units, levels["unit"].to_numpy())
    known[place], positions[place] = levels["level"].to_numpy(), levels["positions"].to_numpy()
    return find_ties(topk, known, positions, float(metadata.get("quantile", "nan")))
