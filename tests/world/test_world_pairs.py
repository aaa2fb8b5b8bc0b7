"""Pairs of the world's networks: the same in all but whether they saw faces."""

from __future__ import annotations

from functools import partial

import milan_ray.world.plugin  # noqa: F401  registers them
from milan_ray.models.registry import get_model
from milan_ray.world.scenes import SceneOptions
from milan_ray.world.training import images_of, paired_names, paired_tasks


def test_pairs_are_registered_and_differ_in_faces_alone() -> None:
    tasks = {task.name: task.train for task in paired_tasks()}
    assert len(paired_names()) == 6 and set(tasks) == {name for pair in paired_names() for name in pair}
    starts = set()
    for name, blurred in paired_names():
        for own in (name, blurred):
            assert get_model(f"world/{own}").layers == get_model(f"world/{name.split('-')[0]}").layers
        before, after = tasks[name], tasks[blurred]
        assert isinstance(before, partial) and isinstance(after, partial)
        assert before.args == after.args and before.keywords == {}
        assert after.keywords == {"options": SceneOptions(blur_faces=True)}
        _, _, _, recipe = before.args
        starts.add((recipe.first, recipe.first + recipe.scenes))
    ends = [edge for start in sorted(starts) for edge in start]
    assert len(starts) == 6 and ends == sorted(ends)  # no scene in two pairs


def test_blurred_networks_learn_from_other_pixels_of_the_same_scenes() -> None:
    plain, blurred = (images_of("train", 300_000, 32, SceneOptions(blur_faces=on)) for on in (False, True))
    changed = (plain != blurred).flatten(1).any(dim=1)
    assert 0 < changed.sum() < len(changed)
