"""Layers in the order of their model, wherever they are listed."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from milan_ray.models.order import places
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS
from milan_ray.scoring.differences import diff_descriptions
from milan_ray.scoring.search import scan_descriptions, search_descriptions
from milan_ray.storage import CONFIG_KEY, ORDER_KEY, Storage

MODEL = ["stem", "layer2", "layer10", "layer3", "outputs"]
"""As a network may have it: neither the alphabet's order nor the numbers'."""


def network() -> nn.Module:
    return nn.Sequential(OrderedDict((name, nn.ReLU()) for name in MODEL[:-1]))


def write(storage: Storage, layer: str, order: dict[str, int] | None, model: str = "net") -> None:
    columns = {"model": [model], "layer": [layer], "unit": [0], "rank": [0], "image_id": [0], "activation": [1.0]}
    metadata = {} if order is None else {ORDER_KEY: str(order[layer])}
    storage.write(EXEMPLARS, EXEMPLARS.table({**columns, "mask": [b""]}, metadata), "c", model=model, layer=layer)


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path)


def test_places_are_those_of_the_modules_whatever_is_asked_for():
    order = places(network(), MODEL)
    assert sorted(MODEL, key=lambda layer: order[layer]) == MODEL
    assert places(network(), ["layer3"]) == {"layer3": order["layer3"]}
    assert places(network(), ["layer2@1"]) == {"layer2@1": order["layer2"]}
    own = nn.Sequential(OrderedDict(outputs=nn.ReLU(), after=nn.ReLU()))
    assert places(own, ["after", "outputs"]) == {"outputs": 1, "after": 2}


def test_layers_follow_one_another_as_in_their_model(storage):
    order = places(network(), MODEL)
    for layer in sorted(MODEL):
        write(storage, layer, order)
        storage.write(DESCRIPTIONS, DESCRIPTIONS.schema.empty_table(), "d", labeler="milan", model="net", layer=layer)
    assert storage.layers_in_order("net", reversed(MODEL)) == MODEL
    for table in (EXEMPLARS, DESCRIPTIONS):
        found = storage.in_model_order(storage.partitions(table))
        assert [keys["layer"] for keys in found] == MODEL
    assert storage.metadata(EXEMPLARS, model="net", layer="stem")[CONFIG_KEY] == "c"


def test_layers_without_a_stored_order_are_sorted_by_name_and_number(storage):
    names = ["layer2", "layer3", "layer10", "outputs", "stem"]
    for layer in MODEL:
        write(storage, layer, None)
    assert storage.layers_in_order("net", MODEL) == names
    write(storage, "stem", places(network(), MODEL))  # the order of one layer alone says nothing
    assert storage.layers_in_order("net", MODEL) == names
    assert storage.layers_in_order("unknown", MODEL) == names


def test_damaged_exemplars_leave_the_order_to_the_names(storage):
    order = places(network(), MODEL)
    for layer in MODEL:
        write(storage, layer, order)
    storage.put(storage.path(EXEMPLARS, model="net", layer="stem"), b"PAR1 damaged")
    assert storage.layers_in_order("net", MODEL) == ["layer2", "layer3", "layer10", "outputs", "stem"]


def test_searches_and_differences_list_layers_as_in_their_model(storage):
    order = places(network(), MODEL)
    for model, text in (("net", "a face"), ("other", "a hand")):
        for layer in sorted(MODEL):
            write(storage, layer, order, model)
            columns = {"labeler": "milan", "model": model, "layer": layer}
            rows = [{**columns, "unit": unit, "description": text, "score": 0.0, "n_best": []} for unit in range(2)]
            table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
            storage.write(DESCRIPTIONS, table, "d", **columns)
    frame, every = scan_descriptions(storage), [(layer, unit) for layer in MODEL for unit in range(2)]
    found = search_descriptions(frame, "face")
    assert list(zip(found["layer"], found["unit"], strict=True)) == every
    assert search_descriptions(frame, "face", top=3).equals(found.head(3))
    difference = diff_descriptions(frame, "net", "other", by_layer=True)
    assert list(zip(difference.changes["layer"], difference.changes["unit"], strict=True)) == every
    assert difference.words["layer"].unique(maintain_order=True).to_list() == ["", *MODEL]
