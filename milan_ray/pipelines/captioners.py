"""Where captioners are found, and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import CONFIG, WEIGHTS, from_bytes, load_reference, to_bytes
from milan_ray.captioner.encoder import PyramidEncoder, get_encoder
from milan_ray.errors import MilanError
from milan_ray.plugins import load_plugins
from milan_ray.storage import Storage

FOLDER = "captioners"
ABOUT = "about.txt"


@dataclass(frozen=True)
class EncoderRequest:
    """An encoder as it travels to workers.

    Attributes:
        name: Registered name.
        weights: Path of a weights file, or None for the encoder's own.
        storage: Where ``decoder`` is looked for.
        decoder: A captioner that brings its encoder's weights, or None.
        plugins: Modules that register the encoder.
    """

    name: str
    weights: str | None = None
    storage: Storage | None = None
    decoder: str | None = None
    plugins: tuple[str, ...] = ()

    def load(self) -> PyramidEncoder:
        """Builds the encoder.

        Raises:
            MilanError: Unknown name, or missing weights.
        """
        load_plugins(self.plugins)
        state = None
        if self.decoder is not None and self.storage is not None and self.weights is None:
            state = load_captioner(self.storage, self.decoder).encoder_state
        return replace(get_encoder(self.name), weights=self.weights).load(state)


def captioner_name(decoder: str) -> str:
    """The name that tables carry for a captioner given by name or path."""
    return Path(decoder).name.removesuffix(".pth")


def load_captioner(storage: Storage, decoder: str) -> Captioner:
    """Finds a captioner.

    Args:
        storage: The run directory, which may hold captioners trained there.
        decoder: Name of one of those; or a folder with a captioner's files; or a published ``.pth`` file.

    Raises:
        MilanError: There is none; the text says where it was looked for.
    """
    if decoder.endswith(".pth"):
        return load_reference(decoder)
    path = f"{FOLDER}/{decoder}"
    if "/" not in decoder and storage.exists(f"{path}/{CONFIG}"):
        return from_bytes({name: storage.get(f"{path}/{name}") for name in (CONFIG, WEIGHTS)})
    folder = Path(decoder).expanduser()
    if not (folder / CONFIG).is_file():
        raise MilanError(
            f"no captioner {decoder!r}: neither {storage.uri(path)} nor a folder {folder.absolute()} holds "
            f"{CONFIG} and {WEIGHTS}; train one with jobs.train or jobs.demo, or give the path of a milan-*.pth file."
        )
    return from_bytes({name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS) if (folder / name).exists()})


def has_captioner(storage: Storage, name: str) -> bool:
    """Whether the run directory holds a captioner of that name."""
    return storage.exists(f"{FOLDER}/{name}/{CONFIG}")


def save_captioner(storage: Storage, name: str, captioner: Captioner, about: str) -> None:
    """Keeps a captioner in the run directory; its configuration comes last and says that it is whole.

    Args:
        storage: The run directory.
        name: Name of the captioner.
        captioner: The captioner.
        about: One sentence on what it was trained on, for people.
    """
    files = to_bytes(captioner)
    storage.put(f"{FOLDER}/{name}/{ABOUT}", about.encode())
    for part in (WEIGHTS, CONFIG):
        storage.put(f"{FOLDER}/{name}/{part}", files[part])


def about_captioner(storage: Storage, decoder: str) -> str:
    """One sentence on what a captioner was trained on; empty where nothing is known."""
    path = f"{FOLDER}/{decoder}/{ABOUT}"
    if "/" not in decoder and storage.exists(path):
        return storage.get(path).decode()
    file = Path(decoder).expanduser() / ABOUT
    return file.read_text(encoding="utf-8") if file.is_file() else ""
