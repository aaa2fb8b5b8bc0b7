"""Saves figures as files reproducibly: the same rows give the same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from milan_ray.schema import FIGURE, Table
from milan_ray.storage import FILE_NAME, Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = ("svg", "png")


def new_figure(width: float, height: float) -> Figure:
    """Creates an empty figure, in inches. It needs no display and is separate from the user's pyplot figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: matplotlib takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def files(figure: Figure) -> dict[str, bytes]:
    """Renders the figure as files: extension → bytes, for each of :data:`ENDINGS`."""
    import matplotlib

    rendered: dict[str, bytes] = {}
    with matplotlib.rc_context({"svg.hashsalt": "milan_ray"}):  # otherwise the ids in the SVG are random
        for kind in ENDINGS:
            buffer = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(buffer, format=kind, metadata=metadata, dpi=120)
            rendered[kind] = buffer.getvalue()
    return rendered


def figure_path(storage: Storage, table: Table, ending: str = "svg", stem: str = FIGURE, **keys: str) -> str:
    """Path of a figure relative to the storage's root: in the folder of a partition, next to its table.

    Args:
        storage: The run directory.
        table: The table.
        ending: File extension, one of :data:`ENDINGS`.
        stem: File name without the extension.
        **keys: Partition keys.
    """
    return storage.path(table, **keys).replace(FILE_NAME, f"{stem}.{ending}")


def store_figure(storage: Storage, table: Table, figure: Figure, stem: str = FIGURE, **keys: str) -> None:
    """Writes a figure next to a partition of a table; arguments are those of :func:`figure_path`."""
    for ending, content in files(figure).items():
        storage.put(figure_path(storage, table, ending, stem, **keys), content)
