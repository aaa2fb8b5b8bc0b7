"""A captioner of units, shown whole images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from toys import toy_captioner

from milan_ray.captioner.encoder import EncoderSpec, PyramidEncoder
from milan_ray.labelers.dnd.unit_captioner import BATCH_SIZE, WholeImages


def own(with_lm: bool = True) -> WholeImages:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2))
    spec = EncoderSpec("tiny", lambda path: backbone, ("0", "2"), size=24)
    captioner = toy_captioner(length=5, beam_size=6, lam=0.5)
    for parameter in captioner.decoder.parameters():
        nn.init.normal_(parameter, std=2.0)
    captioner = captioner if with_lm else replace(captioner, lm=None)
    return WholeImages("milan/toy", captioner, PyramidEncoder(spec, backbone))


def test_every_image_is_described_as_a_unit_of_its_own():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (BATCH_SIZE + 2, 1, 1, 3), dtype=np.uint8)
    images = list(np.broadcast_to(colours, (len(colours), 30, 24, 3)))
    for with_lm in (True, False):
        captions = own(with_lm)
        found = captions.caption(images)
        assert len(found) == len(images) and len(set(found)) > 1
        assert [captions.caption([image])[0] for image in images] == found
        pixels = torch.from_numpy(np.stack(images[:1])).permute(0, 3, 1, 2).float() / 255
        features = captions._encoder(captions._encoder.fit(pixels))[:, None]
        expected = captions._captioner.describe(features, None if with_lm else 0.0)
        assert found[0] == expected[0][0].text
    assert own().identity() == own().identity() != own(False).identity()
