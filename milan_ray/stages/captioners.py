"""Where captioners are found, and kept."""

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
"""What a captioner's name ends with whose candidates are to be re-ranked."""

HOST = "http://milan.csail.mit.edu/models"
MILAN = (
    "base", "cls", "gen", "imagenet", "places365", "alexnet", "resnet152", "biggan",
    "not-alexnet-imagenet", "not-alexnet-places365", "not-resnet152-imagenet", "not-resnet152-places365",
    "not-biggan-imagenet", "not-biggan-places365",
)  # fmt: skip
"""The captioners that MILAN's authors published, by what they were trained on."""


@dataclass(frozen=True)
class EncoderRef:
    """An encoder as it travels to workers.

    Attributes:
        name: Registered name.
        weights: Path of a weights file, or None for the encoder's own.
        storage: Where ``decoder`` is looked for.
        decoder: A captioner that brings its encoder's weights, or None.
        plugins: Modules that register the encoder.
        download: Fetch the encoder's published weights where they are absent.
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
            MilanError: Unknown name, or missing weights.
        """
        load_plugins(self.plugins)
        state = None
        if self.decoder is not None and self.storage is not None and self.weights is None:
            state = load_captioner(self.storage, self.decoder).encoder_state
        return replace(get_encoder(self.name), weights=self.weights).load(state, self.download)


def captioner_name(decoder: str) -> str:
    """The name that tables carry for a captioner given by name or path."""
    return Path(decoder).name.removesuffix(".pth")


def find_milan(key: str) -> str:
    """Finds a published captioner: in ``MILAN_MODELS_DIR``, else by a download into it.

    Args:
        key: One of :data:`MILAN`; ``not-alexnet/imagenet`` is ``not-alexnet-imagenet``.

    Returns:
        Path of its ``.pth`` file.

    Raises:
        MilanError: There is no such captioner, or it can neither be found nor downloaded.
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
    """Finds a captioner.

    Args:
        storage: The run directory, which may hold captioners trained there; None without.
        decoder: Name of one of those; or a folder with a captioner's files; or a ``.pth`` file of the reference's; or
            a key of :data:`MILAN`.

    Raises:
        MilanError: There is none; the text says where it was looked for.
    """
    if decoder.endswith(".pth"):
        return load_reference(decoder)
    path = f"{FOLDER}/{decoder}"
    if storage is not None and has_captioner(storage, decoder):
        there = [name for name in (CONFIG, WEIGHTS) if storage.exists(f"{path}/{name}")]
        return _read({name: storage.get(f"{path}/{name}") for name in there}, storage.uri(path))
    folder = Path(decoder).expanduser()
    if (folder / CONFIG).is_file():
        parts = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
        return _read({name: (folder / name).read_bytes() for name in parts}, str(folder))
    if decoder.replace("/", "-").removesuffix(RERANKED) in MILAN:
        return load_reference(find_milan(decoder))
    places = [f"folder {folder.absolute()}"] if storage is None else [storage.uri(path), f"folder {folder.absolute()}"]
    raise MilanError(
        f"no captioner {decoder!r}: {CONFIG} and {WEIGHTS} are not in {' nor in '.join(places)}; train one with "
        "jobs.train or jobs.demo, or give the path of a milan-*.pth file."
    )


def _read(files: Mapping[str, bytes], folder: str) -> Captioner:
    try:
        return from_bytes(files)
    except MilanError as error:
        raise MilanError(f"{folder}: {error}") from error


def has_captioner(storage: Storage, name: str) -> bool:
    """Whether the run directory holds a captioner of that name."""
    return _one_folder(name) and storage.exists(f"{FOLDER}/{name}/{CONFIG}")


def _one_folder(name: str) -> bool:
    """Whether a captioner in the run directory may be called so; all else is a path."""
    return "/" not in name and name not in ("", ".", "..")


def save_captioner(storage: Storage, name: str, captioner: Captioner, about: str) -> None:
    """Keeps a captioner in the run directory; its configuration comes last and says that it is whole.

    Args:
        storage: The run directory.
        name: Name of the captioner.
        captioner: The captioner.
        about: One sentence on what it was trained on, for people.

    Raises:
        MilanError: No captioner can be called so.
    """
    checked_name("a captioner", name)
    files = to_bytes(captioner)
    storage.put(f"{FOLDER}/{name}/{ABOUT}", about.encode())
    for part in (WEIGHTS, CONFIG):
        storage.put(f"{FOLDER}/{name}/{part}", files[part])


def about_captioner(storage: Storage, decoder: str) -> str:
    """One sentence on what a captioner was trained on; empty where nothing is known."""
    path = f"{FOLDER}/{decoder}/{ABOUT}"
    if _one_folder(decoder) and storage.exists(path):
        return storage.text(path)
    file = Path(decoder).expanduser() / ABOUT
    return file.read_text(encoding="utf-8") if file.is_file() else ""
