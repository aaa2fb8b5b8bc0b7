"""Names, groups and locations of published annotation sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from milan_ray import hub
from milan_ray.annotations.archive import content, extract
from milan_ray.config import data_dir
from milan_ray.errors import MilanError, unknown_name
from milan_ray.names import checked_name

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
"""All annotated sets that can be downloaded. DINO's masks are shifted by one patch, because an early version of the
reference dropped the last token instead of the first."""


Sets = Mapping[tuple[str, str], str]
"""(network, dataset) → name of the annotated model, which is the network dissected on the dataset."""


def groups_of(classifiers: Sets, generators: Sets) -> dict[str, tuple[str, ...]]:
    """The paper's groups of sets: all, by task, by dataset, by network, and all but one (Table 3).

    Args:
        classifiers: Sets of image classifiers.
        generators: Sets of image generators.

    Returns:
        Group → its models: base, cls, gen, every dataset, every network, ``not-NETWORK-DATASET``.
    """
    sets = {**classifiers, **generators}
    parts = dict.fromkeys([dataset for _, dataset in sets] + [network for network, _ in sets])
    return {
        "base": tuple(sets.values()),
        "cls": tuple(classifiers.values()),
        "gen": tuple(generators.values()),
        **{part: tuple(model for pair, model in sets.items() if part in pair) for part in parts},
        **{f"not-{'-'.join(pair)}": tuple(model for other, model in sets.items() if other != pair) for pair in sets},
    }


def pairs_of(names: Sequence[str]) -> Sets:
    """Returns the sets of models whose names are ``NETWORK/DATASET``."""
    return {(network, dataset): f"{network}/{dataset}" for network, dataset in (name.split("/") for name in names)}


GROUPS: dict[str, tuple[str, ...]] = groups_of(pairs_of(BASE[:4]), pairs_of(BASE[4:]))
"""Group → its sets, in the reference's order."""

_GROUPS = dict(GROUPS)


def register_groups(prefix: str, groups: Mapping[str, Sequence[str]]) -> None:
    """Registers groups of annotated models to train on. Plug-ins call it for their own models.

    Args:
        prefix: Prefix of the groups' names, followed by a hyphen. It distinguishes them from the paper's groups.
        groups: Group → its models; :func:`groups_of` builds the paper's groups from other sets.
    """
    _GROUPS.update({f"{prefix}-{name}": tuple(models) for name, models in groups.items()})


def training_groups(names: Sequence[str], annotated: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Resolves the groups of annotated models that a user named for training.

    Args:
        names: Each is one of :data:`GROUPS`, a group that a plug-in registered, an annotated model,
            ``NAME=MODEL,MODEL`` for a user-defined group, or ``all`` for every group whose models are all annotated.
        annotated: The models that have annotations.

    Returns:
        Name of the group, without slashes → its models.

    Raises:
        MilanError: A group does not exist, one of its models has no annotations, or two groups have the same name.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for text in names:
        name, _, members = text.partition("=")
        key = name.replace("/", "-")
        if text == "all":
            groups |= {name: models for name, models in _GROUPS.items() if set(models) <= set(annotated)}
            if not groups:
                raise MilanError(
                    f"no group has annotations of all its models: there are {', '.join(sorted(annotated)) or 'none'}."
                )
            continue
        if members:
            checked_name("a group", key)
            models = tuple(members.split(","))
        elif key in _GROUPS:
            models = _GROUPS[key]
        elif name in annotated:
            models = (name,)
        else:
            raise unknown_name("group", text, [*_GROUPS, *annotated, "all"], "Or give NAME=MODEL,MODEL.")
        missing = [model for model in models if model not in annotated]
        if missing:
            raise MilanError(
                f"group {name}: {', '.join(missing)} have no annotations in the storage; import them first."
            )
        if groups.get(key, models) != models:
            raise MilanError(f"two groups are called {key}; name one otherwise, as NAME=MODEL,MODEL.")
        groups[key] = models
    return groups


@dataclass(frozen=True)
class SetLocation:
    """Location of an existing set.

    Attributes:
        name: Its name, ``model/dataset``.
        root: Its folder.
        annotation_count: ``annotation_count`` to read it with: 3 for the released sets, None for a user's own.
    """

    name: str
    root: Path
    annotation_count: int | None


def locate(text: str, *, download: bool = False) -> list[SetLocation]:
    """Locates the sets that a user named: a group, a set's name, a folder, or a zip, which is unpacked.

    Sets are stored in ``$MILAN_DATA_DIR/<model>/<dataset>``, and zips are unpacked to there. A name takes precedence
    over a folder of the same name; write ``./imagenet`` for the folder.

    Args:
        text: Name or path.
        download: Fetch released sets that are absent.

    Returns:
        The sets, in order.

    Raises:
        MilanError: A set is unknown or absent, or its archive is damaged.
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
        root = extract(path, data_dir() / (name or checked_name("a set", path.stem)))
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
