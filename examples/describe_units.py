"""Descriptions of a network's units by a captioner.

    python examples/describe_units.py [CAPTIONER]

CAPTIONER is a published one (`base`), a `milan-*.pth` file, or the folder of one that you trained (after `make demo`:
`results/demo/captioners/world`). Without it, an untrained captioner shows the calls; its words mean nothing.
"""

from __future__ import annotations

import sys

import torch
from torchvision.models import resnet18

import milan_ray
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.encoder import get_encoder
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.world.probe import WorldProbe


def untrained() -> milan_ray.Milan:
    """Returns a captioner with a small vocabulary and random weights, on the features of an untrained ResNet-18."""
    torch.manual_seed(3)
    indexer = Indexer(Vocabulary.build([["a red house", "dark areas"], ["a dog", "dogs on grass"]]))
    words, weights = len(indexer.vocabulary), resnet18().state_dict()
    decoder = Decoder(DecoderConfig(words, feature_size=1024, embedding_size=16, hidden_size=32))
    model = LanguageModel(LMConfig(words, 16, 32))
    captioner = Captioner(indexer, decoder, model, "resnet18", weights, length=6, beam_size=5, lam=0.2)
    return milan_ray.Milan(captioner, get_encoder("resnet18").load(weights))


def main() -> None:
    """Dissects the first block of a ResNet-18 and describes four of its units."""
    milan = milan_ray.load(sys.argv[1]) if len(sys.argv) > 1 else untrained()
    torch.manual_seed(1)
    dissection = milan_ray.dissect(resnet18(), WorldProbe("probe", 32), layers=["layer1"], k=3)
    descriptions = dissection.describe(milan, units=range(4), n_best=2)
    print(descriptions.select("layer", "unit", "description", "score", "logp_d_given_e", "logp_d"))
    print(f"{len(descriptions)} units described; unit 0: {dissection.lookup('layer1', 0).description!r}")


if __name__ == "__main__":
    main()
