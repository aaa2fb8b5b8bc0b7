"""Finds nearest units, whose exemplars have similar encodings by the captioner's encoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

_BLOCK = 1024  # units compared with all others at once: 64 MiB of cosines for a layer of 16,384 units


def mean_features(pieces: Iterable[pa.Table]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the mean encoding of each unit's exemplars.

    Args:
        pieces: Columns unit and feature (F numbers each) of the table of encodings, in any order; only one piece is
            held in memory at a time.

    Returns:
        U units, ascending, and their means, float32 (U, F).
    """
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    for piece in pieces:
        for batch in piece.to_batches(max_chunksize=_BLOCK):
            if not batch.num_rows:
                continue
            units = batch["unit"].to_numpy()
            order = np.argsort(units, kind="stable")
            features = batch["feature"].flatten().to_numpy(zero_copy_only=False).reshape(len(units), -1)
            present, starts, lengths = np.unique(units[order], return_index=True, return_counts=True)
            totals = np.add.reduceat(features[order], starts, axis=0, dtype=np.float32)
            for unit, total, count in zip(present.tolist(), totals, lengths.tolist(), strict=True):
                sums[unit] = sums[unit] + total if unit in sums else total.copy()
                counts[unit] = counts.get(unit, 0) + count
    units = np.array(sorted(sums), np.int64)
    if not len(units):
        return units, np.zeros((0, 0), np.float32)
    return units, np.stack([sums.pop(unit) / counts[unit] for unit in units.tolist()])


def nearest(features: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the exact nearest neighbours of each unit, by the cosine of mean-centred encodings.

    The mean over units is subtracted, because the encodings of photographs share a large uninformative component.

    Args:
        features: (U, F), float32.
        top: Neighbours per unit.

    Returns:
        Positions of the neighbours, the nearest first (ties: lower position first), int64 (U, min(top, U − 1)); and
        their cosines, float32. A unit that equals the mean has cosine 0 with all.
    """
    count = max(0, min(top, len(features) - 1))
    apart = features - features.mean(axis=0, keepdims=True) if len(features) else features
    lengths = np.linalg.norm(apart, axis=1, keepdims=True)
    apart = np.divide(apart, lengths, out=np.zeros_like(apart), where=lengths > 0)
    places = np.zeros((len(features), count), np.int64)
    cosines = np.zeros((len(features), count), np.float32)
    for start in range(0, len(features) if count else 0, _BLOCK):
        near = apart[start : start + _BLOCK] @ apart.T
        rows = np.arange(len(near))
        near[rows, start + rows] = -np.inf  # excludes the unit itself
        # Candidates are all units that reach the last neighbour's cosine, so that ties are in order of position.
        bars = -np.partition(-near, count - 1, axis=1)[:, count - 1]
        for row in rows:
            candidates = np.flatnonzero(near[row] >= bars[row])
            best = candidates[np.argsort(-near[row, candidates], kind="stable")][:count]
            places[start + row], cosines[start + row] = best, near[row, best]
    return places, cosines
