"""What a network does not look at: margins that it cuts off its pictures, and positions that no picture reaches.

Both are exact: where nothing depends on a part of the picture, or a position on any picture, nothing changes there.
A picture that is cut or padded on the way lies elsewhere in the maps than one takes for granted; and tokens that are
the same for every picture, as class tokens, registers and the ends of rows, are no positions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

SIDES = ("top", "bottom", "left", "right")
"""Margins of the view, as :meth:`milan_ray.models.lit_cells.LitPictures.margins` lights them."""

MARGIN = 16
"""A margin is one part in so many of the view's height or width."""

_FLAT = 1e-6  # of a call's usual answer: what rounding leaves of an answer that is none


def sides_unseen(answers: Collection[torch.Tensor]) -> tuple[str, ...]:
    """The margins on which nothing depends.

    Args:
        answers: Of each call, float64 (4, …): how strongly it answers to each margin, in the order of `SIDES`.
    """
    if not answers:
        return ()
    seen = torch.stack([(answer.flatten(1) > 0).any(1) for answer in answers]).any(0)
    return tuple(side for side, found in zip(SIDES, seen.tolist(), strict=True) if not found)


def still(answer: torch.Tensor) -> torch.Tensor | None:
    """The positions that answer to no picture.

    Args:
        answer: float64 (…), how strongly a call answers to a picture at each position.

    Returns:
        bool (…); None where most do not answer, so that it is no call of positions (queries, embeddings), or all do.
    """
    found = _silent(answer)
    return found if 0 < int(found.sum()) < found.numel() / 2 else None


def padding(answer: torch.Tensor) -> tuple[str, ...]:
    """The sides of a map at which more than `MARGIN` allows answers to no picture.

    Args:
        answer: float64 (h, w), how strongly a map answers to a picture.
    """
    found = _silent(answer)
    if bool(found.all()):  # of a part that gets no picture
        return ()
    rows, columns = found.all(1), found.all(0)
    sides = (rows, rows.flip(0), columns, columns.flip(0))
    widths = [int(side.long().cumprod(0).sum()) for side in sides]
    return tuple(side for side, width, line in zip(SIDES, widths, sides, strict=True) if width * MARGIN > len(line))


def _silent(answer: torch.Tensor) -> torch.Tensor:
    usual = answer[answer > 0]
    return answer <= _FLAT * usual.median() if usual.numel() else torch.ones_like(answer, dtype=torch.bool)
