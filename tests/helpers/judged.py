"""Verdicts written by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

from milan_ray.schema import VERDICTS
from milan_ray.storage import EXEMPLARS_KEY, Storage

JUDGE = "judge"


def judge(
    storage: Storage,
    keys: dict[str, str],
    texts: Sequence[str],
    verdicts: Sequence[str],
    predictor: str = JUDGE,
    exemplars: str | None = None,
) -> None:
    """Writes verdicts on the descriptions of a layer (labeler, model, layer); shuffled ones are all supported."""
    keys = {"predictor": predictor, **keys}
    rows = [
        {**keys, "unit": unit, "system": system, "description": text, "verdict": given, "reason": "by hand"}
        | {"score": 0.5 - unit / 100, "q": unit / 100, "probability": 0.9 - unit / 100, "images": 100}
        for unit, (text, verdict) in enumerate(zip(texts, verdicts, strict=True))
        for system, given in (("own", verdict), ("shuffled", "supported"), ("constant", "unsupported"))
    ]
    columns = {column.name: [row.get(column.name) for row in rows] for column in VERDICTS.columns}
    table = VERDICTS.table(columns, None if exemplars is None else {EXEMPLARS_KEY: exemplars})
    storage.write(VERDICTS, table, "".join([*texts, *verdicts]), **keys)
