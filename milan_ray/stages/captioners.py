"""Finding, loading and storing captioners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from milan_ray import hub
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import CONFIG, WEIGHTS, from_bytes, load_reference, to_bytes
from milan_ray.captioner.encoder import PyramidEncoder, get_encoder
from milan_ray.config import models_dir
from milan_ray.errors import MilanError, unknown_name
from milan_ray.names import checked_name
from milan_ray.plugins import load_plugins
from milan_ray.storage import Storage

FOLDER = "captioners"
ABOUT = "about.txt"

RERANKED = "+clip"
"""Suffix of a published captioner's name that asks for re-ranking by CLIP."""

HOST = "http://milan.csail.mit.edu/models"
MILAN = (
    "base", "cls", "gen", "imagenet", "places365", "alexnet", "resnet152", "biggan",
    "not-alexnet-imagenet", "not-alexnet-places365", "not-resnet152-imagenet", "not-resnet152-places365",
    "not-biggan-imagenet", "not-biggan-places365",
)  # fmt: skip
"""The captioners that MILAN's authors published, named after their training data."""


@dataclass(frozen=True)
class EncoderRef:
    """A reference to an encoder, from which workers load it.

    Attributes:
        name: Registered name.
        weights: Path of a weights file, or None for the encoder's own.
        storage: The run directory that may hold ``decoder``.
        decoder: A captioner stored with its encoder's weights, or None.
        plugins: Modules that register the encoder.
        download: Whether to download the encoder's published weights where they are missing.
    """

    name: str
    weights: str | None = None
    storage: Storage | None = None
    decoder: str | None = None
    plugins: tuple[str, ...] = ()
    download: bool = False

    def load(self) -> PyramidEncoder:
        """Builds the encoder.

        Raises:
            MilanError: The name is unknown, or the weights are missing.
        """
        load_plugins(self.plugins)
        state = None
        if self.decoder is not None and self.storage is not None and self.weights is None:
            state = load_captioner(self.storage, self.decoder).encoder_state
        return replace(get_encoder(self.name), weights=self.weights).load(state, self.download)


def captioner_name(decoder: str) -> str:
    """The name in tables of a captioner that is given by name or path."""
    return Path(decoder).name.removesuffix(".pth")


def find_milan(key: str) -> str:
    """Finds a published captioner in ``MILAN_MODELS_DIR``, or downloads it there.

    Args:
        key: One of :data:`MILAN`; ``not-alexnet/imagenet`` is ``not-alexnet-imagenet``.

    Returns:
        Path of its ``.pth`` file.

    Raises:
        MilanError: The key is unknown, or the captioner can neither be found nor downloaded.
    """
    name = key.replace("/", "-")
    if name.endswith(RERANKED):
        plain = name.removesuffix(RERANKED)
        raise MilanError(
            f"{key!r} is {plain!r} re-ranked by CLIP, which only jobs.describe and milan_ray.load do: use {plain!r}."
        )
    if name not in MILAN:
        raise unknown_name("published captioner", key, MILAN)
    file = f"milan-{name}.pth"
    folders = [models_dir()]
    return str(
        hub.find(file, folders, f"{HOST}/{file}", download=True, variable="MILAN_MODELS_DIR", also=[f"{name}.pth"])
    )


def load_captioner(storage: Storage | None, decoder: str) -> Captioner:
    """Loads a captioner.

    Args:
        storage: The run directory, which may hold trained captioners; None for none.
        decoder: Name of a captioner in the run directory, a folder with a captioner's files, a ``.pth`` file of the
            reference, or a key of :data:`MILAN`.

    Raises:
        MilanError: There is no such captioner; the message lists the places searched.
    """
    if decoder.endswith(".pth"):
        return load_reference(decoder)
    path = f"{FOLDER}/{decoder}"
    if storage is not None and has_captioner(storage, decoder):
        stored = [name for name in (CONFIG, WEIGHTS) if storage.exists(f"{path}/{name}")]
        return _read({name: storage.get(f"{path}/{name}") for name in stored}, storage.uri(path))
    folder = Path(decoder).expanduser()
    if (folder / CONFIG).is_file():
        present = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
        return _read({name: (folder / name).read_bytes() for name in present}, str(folder))
    if decoder.replace("/", "-").removesuffix(RERANKED) in MILAN:
        return load_reference(find_milan(decoder))
    places = [f"folder {folder.absolute()}"] if storage is None else [storage.uri(path), f"folder {folder.absolute()}"]
    raise MilanError(
        f"no captioner {decoder!r}: {CONFIG} and {WEIGHTS} are not in {' nor in '.join(places)}; train one with "
        "jobs.train or jobs.demo, or give the path of a milan-*.pth file."
    )


def _read(files: Mapping[str, bytes], folder: str) -> Captioner:
    """The captioner of some files; errors name the folder."""
    try:
        return from_bytes(files)
    except MilanError as error:
        raise MilanError(f"{folder}: {error}") from error


def has_captioner(storage: Storage, name: str) -> bool:
    """Whether the run directory holds a captioner of this name."""
    return _is_name(name) and storage.exists(f"{FOLDER}/{name}/{CONFIG}")


def _is_name(name: str) -> bool:
    """Whether this can be the name of a captioner in the run directory; anything else is a path."""
    return "/" not in name and name not in ("", ".", "..")


def save_captioner(storage: Storage, name: str, captioner: Captioner, about: str) -> None:
    """Stores a captioner in the run directory; its configuration is written last and marks it complete.

    Args:
        storage: The run directory.
        name: Name of the captioner.
        captioner: The captioner.
        about: One sentence on its training data, for people.

    Raises:
        MilanError: The name is invalid.
    """
    checked_name("a captioner", name)
    files = to_bytes(captioner)
    storage.put(f"{FOLDER}/{name}/{ABOUT}", about.encode())
    for part in (WEIGHTS, CONFIG):
        storage.put(f"{FOLDER}/{name}/{part}", files[part])


def about_captioner(storage: Storage, decoder: str) -> str:
    """One sentence on a captioner's training data; empty where there is none."""
    path = f"{FOLDER}/{decoder}/{ABOUT}"
    if _is_name(decoder) and storage.exists(path):
        return storage.text(path)
    file = Path(decoder).expanduser() / ABOUT
    return file.read_text(encoding="utf-8") if file.is_file() else ""
