"""The registry of probes, and the resolution of names and paths on the command line to probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from milan_ray.errors import MilanError, unknown_name
from milan_ray.names import checked_name
from milan_ray.probe.archives import TAR
from milan_ray.probe.arrays import ParquetProbe
from milan_ray.probe.base import Probe
from milan_ray.probe.decode import image_endings
from milan_ray.probe.files import is_ignored
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.labelled import is_labelled, labelled_folder
from milan_ray.probe.latents import EXTENSIONS as TENSORS
from milan_ray.probe.latents import LatentFiles, latent_files
from milan_ray.probe.tables import ARROW, PARQUET
from milan_ray.remote import is_uri

SHARDS = PARQUET + ARROW + TAR
"""File name endings of shards: files that contain many images."""

_PROBES: dict[str, Callable[[], Probe]] = {}


def register_probe(name: str, factory: Callable[[], Probe]) -> None:
    """Registers a probe under a name; a later registration of the same name replaces it.

    Args:
        name: Name used on the command line.
        factory: Creates the probe; called when the probe is requested.
    """
    checked_name("a probe", name, slashes=True)
    _PROBES[name] = factory


def probe_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_PROBES)


def resolve_probe(
    text: Sequence[str],
    labels: str | None = None,
    legend: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Probe:
    """Resolves a probe from the user's text.

    Args:
        text: A registered name; or one local folder with label maps (:mod:`milan_ray.probe.labelled`); or a generator's
            latents, as one folder of tensors without images or one or several files of tensors; or one or several
            folders, Parquet, Arrow or tar files, or URIs, concatenated in this order (:class:`FolderProbe`).
        labels: File of labels for folders, or None.
        legend: File with the names of the numbers in a folder's label maps, or None.
        image_column: Image column of Parquet, Arrow and tar files; None detects it.
        label_column: Class column of Parquet, Arrow and tar files; None detects it.

    Returns:
        The probe.

    Raises:
        MilanError: No such name, file or folder exists, or labels were given for a probe that has its own.
    """
    if not text:
        raise MilanError("no probe given: name a registered probe or one or several folders of images.")
    single = text[0] if len(text) == 1 else ""
    if legend is not None:
        if not single or is_uri(single) or labels is not None:
            raise MilanError("a legend is for one local folder of images and label maps: give that alone.")
        _without_columns(image_column, label_column, single)
        return labelled_folder(single, legend)
    is_folder = not is_uri(single) and Path(single).expanduser().is_dir()
    if single in _PROBES or (single.lower().endswith(SHARDS) and not is_folder):
        if labels is not None:
            raise MilanError(f"{single} brings its own labels: a file of labels is for folders of images.")
        if single in _PROBES:
            _without_columns(image_column, label_column, single)
            return _PROBES[single]()
        if single.lower().endswith(PARQUET):
            return ParquetProbe(single, image_column, label_column)
    if all(source.lower().endswith(TENSORS) for source in text) or _holds_tensors(single):
        if labels is not None:
            raise MilanError(f"labels are for images: leave them out for the latents {', '.join(text)}.")
        _without_columns(image_column, label_column, ", ".join(text))
        return LatentFiles(text)
    if single and labels is None and not is_uri(single) and is_labelled(Path(single).expanduser()):
        _without_columns(image_column, label_column, single)
        return labelled_folder(single)
    for root in text:
        if root in _PROBES:
            raise MilanError(f"the registered probe {root} cannot be joined with others: give it alone.")
        path = Path(root).expanduser()
        if is_uri(root) or path.is_dir() or (path.is_file() and root.lower().endswith(SHARDS)):
            continue
        if path.is_file():
            raise MilanError(
                f"{root} is one file, and none that ends in {', '.join(SHARDS)}: give the folder of images that it is "
                "in; unpack what is packed."
            )
        raise unknown_name("probe", root, _PROBES, "Give a registered name or an existing folder of images.")
    return FolderProbe(text, labels, image_column, label_column)


def _without_columns(image: str | None, label: str | None, what: str) -> None:
    """Rejects column options for a probe without columns.

    Raises:
        MilanError: A column was given.
    """
    if image is not None or label is not None:
        raise MilanError(f"{what} has no columns: --image-column and --label-column are for Parquet, Arrow and tar.")


def _holds_tensors(source: str) -> bool:
    """Whether a source is a local folder with tensor files and without images and subfolders."""
    folder = Path(source).expanduser()
    if not source or is_uri(source) or not folder.is_dir() or not latent_files(folder):
        return False
    entries = [entry for entry in folder.iterdir() if not is_ignored(entry.name)]
    return not any(entry.is_dir() or entry.suffix.lower() in (*image_endings(), *SHARDS) for entry in entries)
