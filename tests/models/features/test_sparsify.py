"""Folders of sparsify against its formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, random, top
from safetensors.torch import save_file

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions

STATE = {
    "encoder.weight": random(FEATURES, WIDTH),
    "encoder.bias": random(FEATURES),
    "W_dec": random(FEATURES, WIDTH, seed=1),
    "b_dec": random(WIDTH),
}


def save(folder: Path, leave_out: str = "", **config: object) -> Path:
    folder.mkdir()
    save_file({name: tensor for name, tensor in STATE.items() if name != leave_out}, folder / "sae.safetensors")
    entries = {"d_in": WIDTH, "k": 3, "expansion_factor": 32, "num_latents": 0, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(entries | config))
    return folder


def formula(x, choose):
    pre = ((x - STATE["b_dec"]) @ STATE["encoder.weight"].T + STATE["encoder.bias"]).clamp(min=0)
    z = choose(pre)
    return z, z @ STATE["W_dec"] + STATE["b_dec"]


@pytest.mark.parametrize("config", [{}, {"activation": "topk", "transcode": False, "skip_connection": False}])
def test_topk_in_old_and_new_folders(config, tmp_path):
    made = read_dictionary(save(tmp_path / "layer4", **config))
    assert made.sparse == 3
    assert_follows(made, lambda x: formula(x, lambda pre: top(pre, 3)))


def test_groupmax_keeps_one_of_each_group(tmp_path):
    def choose(pre):
        z = torch.zeros_like(pre)
        for row in range(len(pre)):
            for start in range(0, FEATURES, 4):
                best = start + max(range(4), key=lambda i: pre[row, start + i].item())
                z[row, best] = pre[row, best]
        return z

    made = read_dictionary(save(tmp_path / "layer4", activation="groupmax"))
    assert made.sparse == 3
    assert_follows(made, lambda x: formula(x, choose))


def test_k_of_options_replaces_that_of_the_folder(tmp_path):
    folder = save(tmp_path / "layer4")
    assert read_dictionary(folder / "sae.safetensors", ReadingOptions(k=5)).sparse == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "setting 'transcode', which is not read"),
        ({"skip_connection": True}, "skip_connection"),
        ({"signed": True}, "signed"),
        ({"activation": "batchtopk"}, "activation 'batchtopk', which is not read"),
        ({"k": None}, "give k"),
        ({"d_in": 6}, "entry d_in is 6"),
        ({"activation": "groupmax", "k": 5}, "entry k is 5"),
        ({"leave_out": "W_dec"}, "lack the tensor W_dec"),
    ],
)
def test_what_is_not_known_is_refused(config, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(save(tmp_path / "layer4", **config))
