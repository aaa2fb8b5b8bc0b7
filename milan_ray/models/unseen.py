"""Detects margins that a network cuts off its pictures, and positions that respond to no picture.

Both tests are exact: a part of the picture that nothing depends on, and a position that depends on no picture, cause no
change of values.
A picture that the network crops or pads lies elsewhere in the maps than usually assumed. Tokens that are the same for
every picture, such as class tokens, registers and the ends of rows, are not positions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

SIDES = ("top", "bottom", "left", "right")
"""Margins of the view, as :meth:`milan_ray.models.lit_cells.LitPictures.margins` lights them."""

MARGIN = 16
"""The view's height or width divided by the width of a margin."""

_FLAT = 1e-6  # share of a call's median response up to which a response counts as rounding error


def sides_unseen(answers: Collection[torch.Tensor]) -> tuple[str, ...]:
    """The margins on which nothing depends.

    Args:
        answers: For each call, float64 (4, …): the strength of its response to each margin, in the order of `SIDES`.
    """
    if not answers:
        return ()
    seen = torch.stack([(answer.flatten(1) > 0).any(1) for answer in answers]).any(0)
    return tuple(side for side, is_seen in zip(SIDES, seen.tolist(), strict=True) if not is_seen)


def still(answer: torch.Tensor) -> torch.Tensor | None:
    """The positions that respond to no picture.

    Args:
        answer: float64 (…), the strength of a call's response to a picture at each position.

    Returns:
        bool (…); None where all positions respond, or where most do not, because these are not positions (queries,
        embeddings).
    """
    silent = _silent(answer)
    return silent if 0 < int(silent.sum()) < silent.numel() / 2 else None


def padding(answer: torch.Tensor) -> tuple[str, ...]:
    """The sides of a map with a strip, wider than a margin (see `MARGIN`), that responds to no picture.

    Args:
        answer: float64 (h, w), the strength of a map's response to a picture.
    """
    silent = _silent(answer)
    if bool(silent.all()):  # this part of the network gets no picture
        return ()
    rows, columns = silent.all(1), silent.all(0)
    sides = (rows, rows.flip(0), columns, columns.flip(0))
    widths = [int(side.long().cumprod(0).sum()) for side in sides]
    return tuple(side for side, width, line in zip(SIDES, widths, sides, strict=True) if width * MARGIN > len(line))


def _silent(answer: torch.Tensor) -> torch.Tensor:
    usual = answer[answer > 0]
    return answer <= _FLAT * usual.median() if usual.numel() else torch.ones_like(answer, dtype=torch.bool)
