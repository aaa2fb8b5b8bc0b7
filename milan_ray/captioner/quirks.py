"""Defects of the reference's captioner, off by default; switch them on to reproduce its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Quirks:
    """Which of the reference's defects to reproduce.

    Attributes:
        lm_counts_past_stop: log p(d) includes one token after ``<stop>`` where the sequence has one.
        batch_dependent_length: Every beam is as long as the longest of its *batch*, so with ``lm_counts_past_stop`` a
            unit's scores depend on the batch. If off, it is as long as the longest of its own unit.
        keep_last_weights: Early stopping keeps the weights of the last epoch instead of the best one.
        plain_choice: The candidate with the best score is the description, even where it breaks off ("The top of
            the"), and its tokens are joined by blanks ("People 's heads").
    """

    lm_counts_past_stop: bool = False
    batch_dependent_length: bool = False
    keep_last_weights: bool = False
    plain_choice: bool = False

    def of_search(self) -> dict[str, bool]:
        """Those that candidates and their scores depend on, as part of their fingerprint."""
        return {name: on for name, on in asdict(self).items() if name != "plain_choice"}


NO_QUIRKS = Quirks()
REFERENCE = Quirks(lm_counts_past_stop=True, batch_dependent_length=True, keep_last_weights=True, plain_choice=True)
