"""Features of two networks are the same where one dictionary encoded both."""

from __future__ import annotations

from milan_ray.config import Fingerprint
from milan_ray.schema import EXEMPLARS
from milan_ray.scoring.comparable import same_features
from milan_ray.storage import Storage


def test_same_features_are_those_of_one_dictionary(tmp_path):
    storage = Storage(tmp_path)
    made = {("one", "a"): None, ("other", "a"): None, ("one", "a#sae"): "5", ("other", "a#sae"): "5"}
    made |= {("one", "a#pca"): "6", ("other", "a#pca"): "7", ("one", "a#own"): "8"}
    for (model, layer), digest in made.items():
        inputs = {"layer": layer} | ({} if digest is None else {"features": digest})
        nothing = EXEMPLARS.table({column.name: [] for column in EXEMPLARS.columns})
        storage.write(EXEMPLARS, nothing, Fingerprint.of(inputs), model=model, layer=layer)
    assert same_features(storage, "one", "other") == ["a#sae"]
