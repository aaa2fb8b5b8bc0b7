"""Names of published sets and groups of them, and where they lie (REFERENCE §7)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from milan_ray import hub
from milan_ray.annotations.archive import content, extract
from milan_ray.config import data_dir
from milan_ray.errors import MilanError, unknown_name

RELEASED_COUNT = 3
"""``annotation_count`` with which the reference loads the released sets."""

HOST = "http://milan.csail.mit.edu"

BASE = (
    "alexnet/imagenet",
    "alexnet/places365",
    "resnet152/imagenet",
    "resnet152/places365",
    "biggan/imagenet",
    "biggan/places365",
)
"""The annotated sets that the published captioners were trained on."""

RELEASED = (*BASE, "dino_vits8/imagenet")
"""All annotated sets that can be downloaded. In DINO's the masks are one patch off: they were made when the reference
still dropped the last token in place of the first (REFERENCE §1.5)."""


def _of(part: str) -> tuple[str, ...]:
    return tuple(name for name in BASE if part in name.split("/"))


GROUPS: dict[str, tuple[str, ...]] = {
    "base": BASE,
    "cls": _of("alexnet") + _of("resnet152"),
    "gen": _of("biggan"),
    **{part: _of(part) for part in ("imagenet", "places365", "alexnet", "resnet152", "biggan")},
    **{f"not-{name.replace('/', '-')}": tuple(other for other in BASE if other != name) for name in BASE},
}
"""Group → its sets, in the reference's order."""


def training_groups(names: Sequence[str], annotated: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Finds what users mean by groups of annotated models to train on.

    Args:
        names: Each one of :data:`GROUPS`, an annotated model, ``NAME=MODEL,MODEL`` for a group of one's own, or
            ``all`` for every group of :data:`GROUPS` whose models are all annotated.
        annotated: The models that have annotations.

    Returns:
        Name of the group, without slashes → its models.

    Raises:
        MilanError: There is no such group, a model of it has no annotations, or two groups have one name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in names:
        name, _, members = text.partition("=")
        key = name.replace("/", "-")
        if text == "all":
            found |= {name: models for name, models in GROUPS.items() if set(models) <= set(annotated)}
            if not found:
                raise MilanError(
                    f"no group has annotations of all its models: there are {', '.join(sorted(annotated)) or 'none'}."
                )
            continue
        if members:
            models = tuple(members.split(","))
        elif key in GROUPS:
            models = GROUPS[key]
        elif name in annotated:
            models = (name,)
        else:
            raise unknown_name("group", text, [*GROUPS, *annotated, "all"], "Or give NAME=MODEL,MODEL.")
        missing = [model for model in models if model not in annotated]
        if missing:
            raise MilanError(
                f"group {name}: {', '.join(missing)} have no annotations in the storage; import them first."
            )
        if found.get(key, models) != models:
            raise MilanError(f"two groups are called {key}; name one otherwise, as NAME=MODEL,MODEL.")
        found[key] = models
    return found


@dataclass(frozen=True)
class SetLocation:
    """A set that is there.

    Attributes:
        name: Its name, ``model/dataset``.
        root: Its folder.
        annotation_count: With which it is to be read: 3 for the released sets, None for a user's own.
    """

    name: str
    root: Path
    annotation_count: int | None


def locate(text: str, *, download: bool = False) -> list[SetLocation]:
    """Finds what a user means by a set: a group, a set's name, a folder, or a zip, which is unpacked.

    Sets lie in ``$MILAN_DATA_DIR/<model>/<dataset>``; zips in ``$MILAN_DATA_DIR`` are unpacked there. A name wins over
    a folder of the same name; ``./imagenet`` is the folder.

    Args:
        text: Name or path.
        download: Fetch released sets that are absent.

    Returns:
        The sets, in order.

    Raises:
        MilanError: Unknown, absent, or not a sound archive.
    """
    if text in GROUPS:
        return [location for name in GROUPS[text] for location in locate(name, download=download)]
    path = Path(text).expanduser()
    own = data_dir() / text
    if text in RELEASED:
        return [SetLocation(text, _released(text, download), RELEASED_COUNT)]
    if own.is_dir() and text.count("/") == 1:
        return [SetLocation(text, own, None)]
    if path.is_file() and path.suffix == ".zip":
        name = next((name for name in RELEASED if name.replace("/", "-") == path.stem), None)
        root = extract(path, data_dir() / (name or path.stem))
        return [SetLocation(name or path.stem, root, RELEASED_COUNT if name else None)]
    if path.is_dir():
        path = path.absolute()
        return [SetLocation(f"{path.parent.name}/{path.name}", path, None)]
    raise unknown_name("set of annotations", text, [*GROUPS, *RELEASED], "Give a group, a set, a folder or a zip.")


def _released(name: str, download: bool) -> Path:
    root = data_dir() / name
    if root.is_dir():
        return content(root)
    zip_name = f"{name.replace('/', '-')}.zip"
    try:
        file = hub.find(
            zip_name, [data_dir()], f"{HOST}/data/{zip_name}", download=download, variable="MILAN_DATA_DIR",
            hint="or add --download",
        )  # fmt: skip
    except MilanError as error:
        raise MilanError(f"the set {name} is not in {root}, and {error}") from error
    return extract(file, root)
