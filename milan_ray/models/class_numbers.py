"""Classes of images as numbers of a classifier's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from milan_ray.errors import MilanError
from milan_ray.models.registry import ModelSpec


def class_numbers(labels: Sequence[str | None], spec: ModelSpec) -> tuple[tuple[str, ...], list[int]]:
    """Numbers the classes of images as a model's outputs.

    Uses the names of the outputs if the model has names and the images' classes are among them; otherwise numbers the
    classes in alphabetical order, as folders of classes usually are.

    Args:
        labels: Class of each image.
        spec: The model.

    Returns:
        Names of the classes, and each image's number.

    Raises:
        MilanError: There are no images, an image has no class, or there are more classes than outputs.
    """
    names = sorted({label for label in labels if label is not None})
    if not names or None in labels:
        raise MilanError(
            "accuracy needs images with classes, and some have none: give a folder of class folders, or --labels."
        )
    if spec.classes is not None:
        if set(names) <= set(spec.classes):
            names = list(spec.classes)
        elif len(names) != len(spec.classes):
            raise MilanError(
                f"{spec.name} tells {len(spec.classes)} classes, {', '.join(spec.classes[:3])}, …, and the images have "
                f"{len(names)}, {', '.join(names[:3])}, …: give images of the model's classes."
            )
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), [numbers[str(label)] for label in labels]
