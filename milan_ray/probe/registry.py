"""The registry of probes, and what a user may write in place of a registered name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from milan_ray.errors import MilanError, unknown_name
from milan_ray.probe.arrays import ParquetProbe
from milan_ray.probe.base import Probe
from milan_ray.probe.folder import EXTENSIONS, FolderProbe
from milan_ray.probe.labelled import is_labelled, labelled_folder
from milan_ray.probe.latents import EXTENSIONS as TENSORS
from milan_ray.probe.latents import LatentFiles, latent_files
from milan_ray.remote import is_uri

_PROBES: dict[str, Callable[[], Probe]] = {}


def register_probe(name: str, factory: Callable[[], Probe]) -> None:
    """Registers a probe under a name; a later registration of the same name replaces it.

    Args:
        name: Name used on the command line.
        factory: Makes the probe; called when the probe is asked for.
    """
    _PROBES[name] = factory


def probe_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_PROBES)


def resolve_probe(text: Sequence[str], labels: str | None = None, legend: str | None = None) -> Probe:
    """Finds the probe that the user means.

    Args:
        text: A registered name; or one Parquet file (images in its column ``image``, classes in ``label`` if it has
            one); or one local folder with label maps (:mod:`milan_ray.probe.labelled`); or a generator's latents, as
            one folder of tensors without images or one or several files of tensors; or one or several folders or
            URIs, joined in this order.
        labels: File of labels for folders, or None.
        legend: What the numbers in a folder's label maps mean, or None.

    Returns:
        The probe.

    Raises:
        MilanError: There is no such name, file or folder, or labels were given for a probe that has its own.
    """
    if not text:
        raise MilanError("no probe given: name a registered probe or one or several folders of images.")
    single = text[0] if len(text) == 1 else ""
    if legend is not None:
        if not single or is_uri(single) or labels is not None:
            raise MilanError("a legend is for one local folder of images and label maps: give that alone.")
        return labelled_folder(single, legend)
    if single in _PROBES or single.endswith(".parquet"):
        if labels is not None:
            raise MilanError(f"{single} brings its own labels: a file of labels is for folders of images.")
        return _PROBES[single]() if single in _PROBES else ParquetProbe(single)
    if all(source.lower().endswith(TENSORS) for source in text) or _holds_tensors(single):
        if labels is not None:
            raise MilanError(f"labels are for images: leave them out for the latents {', '.join(text)}.")
        return LatentFiles(text)
    if single and labels is None and not is_uri(single) and is_labelled(Path(single).expanduser()):
        return labelled_folder(single)
    for root in text:
        if not is_uri(root) and not Path(root).expanduser().is_dir():
            raise unknown_name("probe", root, _PROBES, "Give a registered name or an existing folder of images.")
    return FolderProbe(text, labels)


def _holds_tensors(source: str) -> bool:
    """Whether a source is a local folder with files of tensors in it, and neither images nor further folders."""
    folder = Path(source).expanduser()
    if not source or is_uri(source) or not folder.is_dir() or not latent_files(folder):
        return False
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return not any(entry.is_dir() or entry.suffix.lower() in EXTENSIONS for entry in entries)
