"""The reference's defects that live in the captioner: off by default, on to reproduce its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirks:
    """Which of the reference's defects to reproduce.

    Attributes:
        lm_counts_past_stop: log p(d) counts one token after ``<stop>`` when the sequence has one there.
        batch_dependent_length: A beam counts as long as the longest of its *batch*, so with ``lm_counts_past_stop``
            the same unit scores differently in another batch. Off, it is as long as its own unit's longest.
        keep_last_weights: Early stopping keeps the last epoch's weights instead of the best.
    """

    lm_counts_past_stop: bool = False
    batch_dependent_length: bool = False
    keep_last_weights: bool = False


NO_QUIRKS = Quirks()
REFERENCE = Quirks(lm_counts_past_stop=True, batch_dependent_length=True, keep_last_weights=True)
