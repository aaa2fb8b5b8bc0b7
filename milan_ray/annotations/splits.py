"""Train/test splits of annotated units, for the paper's kinds of generalization (§4, Table 3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import permutations

from milan_ray.annotations.groups import BASE, RELEASED, Sets, groups_of, pairs_of, training_groups
from milan_ray.errors import MilanError, unknown_name

WITHIN = "within-network"
ACROSS_ARCHITECTURES = "across-architectures"
ACROSS_DATASETS = "across-datasets"
ACROSS_TASKS = "across-tasks"
LEAVE_ONE_OUT = "leave-one-out"
OWN = "own"

KINDS = (WITHIN, ACROSS_ARCHITECTURES, ACROSS_DATASETS, ACROSS_TASKS, LEAVE_ONE_OUT)
"""Kinds of splits in the paper and its reference implementation, in their order."""


@dataclass(frozen=True)
class Split:
    """The units that a captioner is trained on, and those that it is tested on.

    Attributes:
        kind: One of :data:`KINDS`, or :data:`OWN`.
        name: Name of the split, without slashes.
        train: Name of the group whose units are used for training.
        test: Name of the group whose units are described.
        train_models: Models of the training group.
        test_models: Models of the test group; the same if units of the same models are divided.
    """

    kind: str
    name: str
    train: str
    test: str
    train_models: tuple[str, ...]
    test_models: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether training and test units come from the same models, divided differently in each trial."""
        return self.train_models == self.test_models

    @property
    def models(self) -> tuple[str, ...]:
        """All models of both groups, without duplicates."""
        return tuple(dict.fromkeys(self.train_models + self.test_models))


def splits_of(classifiers: Sets, generators: Sets, others: Sets | None = None, prefix: str = "") -> tuple[Split, ...]:
    """Builds the paper's splits for any sets.

    Args:
        classifiers: Sets of image classifiers.
        generators: Sets of image generators.
        others: Test-only sets, described by a captioner trained on all the sets above: the paper's ViT.
        prefix: Prefix of the groups' names, as for :func:`~milan_ray.annotations.groups.register_groups`.

    Returns:
        Splits within every set; between every two networks of classifiers, and from all sets to each of ``others``;
        between every two datasets; between classifiers and generators; from all sets but one to that one.
    """
    sets = {**classifiers, **generators}
    groups = groups_of(classifiers, generators)
    networks = list(dict.fromkeys(network for network, _ in classifiers))
    datasets = list(dict.fromkeys(dataset for _, dataset in sets))

    def named(group: str) -> str:
        return f"{prefix}-{group}" if prefix else group

    def between(kind: str, train: str, test: str, models: tuple[str, ...] | None = None) -> Split:
        name = f"{named(train)}-to-{named(test)}"
        return Split(kind, name, named(train), named(test), groups[train], models or groups[test])

    return (
        *(_within(named("-".join(pair)), (model,)) for pair, model in sets.items()),
        *(between(ACROSS_ARCHITECTURES, *pair) for pair in permutations(networks, 2)),
        *(between(ACROSS_ARCHITECTURES, "base", "-".join(pair), (model,)) for pair, model in (others or {}).items()),
        *(between(ACROSS_DATASETS, *pair) for pair in permutations(datasets, 2)),
        *(between(ACROSS_TASKS, *pair) for pair in permutations(("cls", "gen"), 2)),
        *(between(LEAVE_ONE_OUT, f"not-{'-'.join(pair)}", "-".join(pair), (model,)) for pair, model in sets.items()),
    )


def _within(group: str, models: tuple[str, ...]) -> Split:
    return Split(WITHIN, f"within-{group}", group, group, models, models)


SPLITS = splits_of(pairs_of(BASE[:4]), pairs_of(BASE[4:]), pairs_of([name for name in RELEASED if name not in BASE]))
"""The paper's splits of MILANNOTATIONS."""

_SPLITS = {split.name: split for split in SPLITS}


def register_splits(splits: Sequence[Split]) -> None:
    """Registers splits. Plug-ins call it for their own annotated models, with splits from :func:`splits_of`."""
    _SPLITS.update({split.name: split for split in splits})


def chosen_splits(texts: Sequence[str], annotated: Collection[str]) -> tuple[Split, ...]:
    """Resolves the splits that a user named.

    Args:
        texts: Each is ``all``, one of :data:`KINDS`, the name of a split, ``TRAIN:TEST`` for two groups, or one group
            whose units are to be divided. A group is anything that
            :func:`~milan_ray.annotations.groups.training_groups` accepts, or a list of models, ``MODEL,MODEL``.
        annotated: The models that have annotations.

    Returns:
        The splits, without duplicates; ``all`` and kinds yield only splits whose models are all annotated.

    Raises:
        MilanError: A split or group does not exist, models lack annotations, or a model is in both groups.
    """
    splits: dict[str, Split] = {}
    for text in texts:
        chosen = _chosen(text, annotated)
        for split in chosen:
            if splits.setdefault(split.name, split) != split:
                raise MilanError(f"two splits are called {split.name}; name a group otherwise, as NAME=MODEL,MODEL.")
    return tuple(splits.values())


def _chosen(text: str, annotated: Collection[str]) -> list[Split]:
    if text == "all" or text in KINDS:
        known = [split for split in _SPLITS.values() if text in ("all", split.kind)]
        complete = [split for split in known if set(split.models) <= set(annotated)]
        if not complete:
            there = ", ".join(sorted(annotated)) or "none"
            raise MilanError(f"no split of {text} has annotations of all its models: there are {there}.")
        return complete
    if text in _SPLITS:
        missing = [model for model in _SPLITS[text].models if model not in annotated]
        if missing:
            raise MilanError(f"split {text}: {', '.join(missing)} have no annotations in the storage; import them.")
        return [_SPLITS[text]]
    sides = [_group(side, text, annotated) for side in text.split(":")]
    if len(sides) > 2:
        raise unknown_name("split", text, ["all", *KINDS, *_SPLITS], "Or give TRAIN:TEST, two groups of models.")
    ((train, models), (test, judged)) = sides[0], sides[-1]
    if len(sides) == 1:
        return [_within(train, models)]
    if both := sorted(set(models) & set(judged)):
        raise MilanError(
            f"split {text}: {', '.join(both)} would train and judge; give {train} alone to divide the units of a group."
        )
    name = f"{train}-to-{test}"
    named = _SPLITS.get(name)
    if named is not None and (named.train_models, named.test_models) == (models, judged):
        return [named]
    return [Split(OWN, name, train, test, models, judged)]


def _group(text: str, split: str, annotated: Collection[str]) -> tuple[str, tuple[str, ...]]:
    named = f"{text.replace(',', '+')}={text}" if "," in text and "=" not in text else text
    groups = training_groups([named], annotated)
    if len(groups) > 1:
        raise MilanError(f"split {split}: {text!r} is no group but all of them; name models, as NAME=MODEL,MODEL.")
    ((name, models),) = groups.items()
    return name, models
