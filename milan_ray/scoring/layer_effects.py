"""Effects of a layer's units on one image after the other: the fastest way that gives what real reruns give."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from milan_ray.errors import MilanError
from milan_ray.models.interventions import CHANGES, Interventions
from milan_ray.models.readout import Readout, linear_readout
from milan_ray.models.tail import Tail
from milan_ray.scoring.effects import EffectSums, are_probabilities, log_scores

ROWS = (12, 510)
"""Rows of a pass, at least and at most: whole numbers of units."""

ROW_BYTES = {"cpu": 2**20}
"""Kind of device → bytes of the layer's values in all rows of a pass: more do not fit into the caches of a CPU, and
take up to twice as long."""

MOST_BYTES = 2**26
"""The same for other devices."""

RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""How far class scores of two ways may be apart: of the largest change, and of the largest score."""


class LayerEffects:
    """Changes the units of a layer on images, and adds up what that does to class scores.

    Three ways give the scores: a linear readout, where only linear operations come after the layer; passes that begin
    behind the layer; passes of the whole network. On every image the way that is tried is compared with a pass of the
    whole network, for all changes of the image's strongest unit and the ablation of one more unit. Where they differ,
    the next way is taken for this image. Units without a value on an image are left out: nothing changes.

    Args:
        tail: The network behind the layer.
        interventions: The changes.
    """

    def __init__(self, tail: Tail, interventions: Interventions) -> None:
        self._tail, self._interventions = tail, interventions
        self._readout: Readout | None = None
        self._probabilities = False
        self._is_read = False

    def add(self, view: torch.Tensor, image_id: int, sums: EffectSums | None = None) -> EffectSums:
        """Adds an image.

        Args:
            view: uint8 (H, W, bands), the model's view.
            image_id: Its id, which chooses the second unit that is compared.
            sums: What to add to; None begins.

        Raises:
            MilanError: The model does not put out class scores, or they are not finite.
        """
        if not self._is_read:
            self._read(view)
        values = self._tail.record(view)
        base = self._tail.base_logits
        if not values.isfinite().all() or not base.isfinite().all():
            raise MilanError(
                "the network puts out NaN or infinite values, or lacks the weights that tell classes: effects on "
                "classes need a whole classifier."
            )
        amounts = self._interventions.amounts(values)
        if sums is None:
            sums = EffectSums.empty(len(amounts), len(base), amounts.device)
        places = (amounts != 0).any(dim=1).nonzero()[:, 0]
        linear, whole = self._way(values, amounts, base, places, image_id)
        sums.add_image(amounts, whole, linear)
        for some in self._pairs(places).split(self._rows(values)) if len(places) else ():
            scores = self._scores(values, amounts, base, some, linear, whole)
            sums.add(some, log_scores(base, self._probabilities), log_scores(scores, self._probabilities))
        return sums

    def _read(self, view: torch.Tensor) -> None:
        """Looks at the network with fixed views like this one: what is found depends on no image."""
        noise = torch.Generator().manual_seed(0)
        scores = []
        for each in (torch.randint(256, view.shape, generator=noise, dtype=torch.uint8), torch.zeros_like(view)):
            values = self._tail.record(each)
            scores.append(self._tail.base_logits)
        self._probabilities = are_probabilities(torch.stack(scores), self._tail.coarse)
        self._readout, self._is_read = linear_readout(self._tail, values), True

    def _rows(self, values: torch.Tensor) -> int:
        """Rows of a pass: a whole number of units, so that what a unit shares a pass with is another unit's changes."""
        fit = ROW_BYTES.get(values.device.type, MOST_BYTES) // max(1, values.numel() * values.element_size())
        least, most = ROWS
        return len(CHANGES) * (max(least, min(most, fit)) // len(CHANGES))

    def _pairs(self, places: torch.Tensor) -> torch.Tensor:
        """All changes of some units, unit by unit: int64 (R, 2)."""
        changes = torch.arange(len(CHANGES), device=places.device).repeat(len(places))
        return torch.stack([changes, places.repeat_interleave(len(CHANGES))], dim=1)

    def _scores(
        self,
        values: torch.Tensor,
        amounts: torch.Tensor,
        base: torch.Tensor,
        pairs: torch.Tensor,
        linear: bool,
        whole: bool,
    ) -> torch.Tensor:
        """Class scores (R, classes) of some changes, in one of the three ways."""
        if linear:
            assert self._readout is not None
            changes, units = pairs.unbind(1)
            added = self._interventions.scales[changes, None] * amounts[units]
            return base + self._readout.changes(added, self._interventions.vectors[changes, units])
        rows = self._interventions.rows(values, amounts, pairs)
        return self._tail.whole_logits(rows) if whole else self._tail.logits(rows)

    def _way(
        self, values: torch.Tensor, amounts: torch.Tensor, base: torch.Tensor, places: torch.Tensor, image_id: int
    ) -> tuple[bool, bool]:
        """Whether this image's scores come from the linear readout, and whether from the whole network."""
        if not len(places):
            return False, False
        strongest = amounts.abs().sum(dim=1).argmax().view(1)
        other = places[(image_id * 7919) % len(places)].view(1)
        pairs = torch.cat([self._pairs(strongest), self._pairs(other)[:1]])
        wanted = self._tail.whole_logits(self._interventions.rows(values, amounts, pairs))
        tolerance = RELATIVE * (wanted - base).abs().max() + ABSOLUTE * wanted.abs().max()
        for linear in (True, False)[self._readout is None :]:
            scores = self._scores(values, amounts, base, pairs, linear, whole=False)
            fell_back = not linear and not self._tail.replayed
            if not fell_back and bool(((scores - wanted).abs() <= tolerance).all()):
                return linear, False
        return False, True


@torch.no_grad()
def check_reaches(tail: Tail, views: Sequence[torch.Tensor], what: str) -> int:
    """Checks that class scores depend on a layer.

    Args:
        tail: The network behind the layer.
        views: Views to try, uint8 (H, W, bands).
        what: The layer, for messages.

    Returns:
        Number of classes.

    Raises:
        MilanError: They do not, or the network puts out no class scores.
    """
    generator = torch.Generator().manual_seed(0)
    for view in views:
        values = tail.record(view)
        size = values.abs().max() + 1
        noise = torch.randn(2, *values.shape, generator=generator).to(values) * size
        scores = tail.whole_logits(torch.cat([values[None], values + noise]))
        if bool((scores - scores[0]).abs().max() > 1e-6 * scores.abs().max()):  # more than rounding
            return scores.shape[1]
    raise MilanError(
        f"{what} does not reach the class scores: whatever it puts out, they are the same; choose another layer."
    )
