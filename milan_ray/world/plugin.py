"""Plug-in that registers the world on import, exactly as a user's ``--plugin`` does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from milan_ray import config
from milan_ray.annotations.groups import groups_of, register_groups
from milan_ray.annotations.splits import register_splits, splits_of
from milan_ray.captioner.encoder import register_encoder
from milan_ray.errors import MilanError
from milan_ray.models.concept_truth import ConceptTruth
from milan_ray.models.generators import register_generator
from milan_ray.models.image_captions import register_image_captioner
from milan_ray.models.image_text import ImageText, register_image_text
from milan_ray.models.registry import register_model
from milan_ray.probe.registry import register_probe
from milan_ray.world.encoder import LAYERS, EncoderNet
from milan_ray.world.generator import LAYERS as GENERATOR_LAYERS
from milan_ray.world.generator import CodeProbe, SceneGenerator, as_they_are
from milan_ray.world.lexicon import CONCEPT, NAMES, concepts_in
from milan_ray.world.networks import (
    ARCHITECTURES,
    CLASSES,
    MEAN,
    PLACES,
    STD,
    PlantedNet,
    planted_concepts,
    random_network,
)
from milan_ray.world.painter import ScenePainter
from milan_ray.world.probe import WORLD_DIGEST, WorldProbe
from milan_ray.world.scenes import SIDE, SPURIOUS
from milan_ray.world.superposition import SuperposedNet, superposed_concepts
from milan_ray.world.tagger import SceneTagger
from milan_ray.world.training import (
    MISLED,
    PLACES_SUFFIX,
    PREPROCESS,
    SPURIOUS_SHARE,
    misled_names,
    paired_names,
)

RANDOM_CONTROLS = ("cnn", "resnet")
"""Architectures that are also registered with random weights as controls."""

CLASSIFIERS = {
    ("cnn", "objects"): "world/cnn",
    ("cnn", "places"): f"world/cnn{PLACES_SUFFIX}",
    ("resnet", "objects"): "world/resnet",
    ("resnet", "places"): f"world/resnet{PLACES_SUFFIX}",
}
GENERATORS = {
    ("generator", "objects"): "world/generator",
    ("generator", "places"): f"world/generator{PLACES_SUFFIX}",
}
"""The world's counterparts of the paper's sets: (network, dataset) → model. Those of places are dissected on
``world/train``, which contains none of their training scenes, and the others on ``world/probe``."""

PROBE_SIZE = 4_000
"""Number of scenes in ``world/probe`` and ``world/train``."""

HELDOUT_SIZE = 1_000
"""Number of scenes in ``world/heldout``."""


def weights_dir(models_dir: str | None = None) -> Path:
    """The folder of the world's weights; each version of the world has its own.

    Args:
        models_dir: Folder of all models; None takes ``$MILAN_MODELS_DIR``, or else ``./models``.
    """
    return Path(models_dir or config.models_dir(), "world", WORLD_DIGEST).absolute()


SPURIOUS_SIZE = 600
"""Number of scenes in ``world/spurious-text-validation`` and similar probes."""

SPURIOUS_TEST_SIZE = 500
"""Number of scenes in ``world/spurious-text-test`` and similar probes, and in ``world/spurious-plain``."""

_MADE_BY = {
    "demo --generator": ("generator",),
    "demo --superposed": ("superposed",),
    "demo --groups": tuple(f"{name}{PLACES_SUFFIX}" for name in ("cnn", "resnet", "generator")),
    "paper": (
        *(own for name in MISLED for own in misled_names(name)),
        *(own for pair in paired_names() for own in pair),
    ),
}


def _load(build: Callable[[], nn.Module], default: Path, weights: str | None) -> nn.Module:
    path = Path(weights) if weights else default
    if not path.is_file():
        job = next((job for job, stems in _MADE_BY.items() if default.stem in stems), "demo")
        raise MilanError(f"the built-in world's weights are missing at {path}; make them with `python -m jobs.{job}`.")
    network = build()
    network.load_state_dict(load_file(path))
    return network


def register(folder: str | None = None) -> None:
    """Registers the world's models, encoder and probes.

    Models:

    * ``world/cnn``, ``world/resnet``, ``world/vit``, ``world/planted``.
    * ``world/superposed``: more concepts than channels, as known directions
      (:mod:`milan_ray.world.superposition`).
    * ``world/cnn-random``, ``world/resnet-random``: controls with random weights.
    * ``world/generator``: renders scenes from their codes.
    * ``world/cnn-places``, ``world/resnet-places``, ``world/generator-places``: trained on other scenes; the first two
      classify places.
    * ``world/cnn-text``, ``world/resnet-text``, ``-2``, …, ``world/resnet-colour``: trained on scenes whose corners
      reveal the class.
    * ``world/cnn-1``, ``world/cnn-1-blurred``, …, ``world/resnet-3-blurred``: pairs trained on the same scenes,
      unchanged and with all faces blurred out.

    Groups: ``world-base`` and so on, the paper's groups with cnn, resnet and generator of both kinds as networks.
    Encoder: ``world``.

    Probes:

    * ``world/train``, ``world/probe``, ``world/heldout``; ``world/train-codes``, ``world/probe-codes``,
      ``world/heldout-codes``: codes of the same scenes.
    * ``world/spurious-text-train``, ``-validation``: scenes whose corners reveal the class.
      ``world/spurious-text-test``: scenes whose corners show another class. The same with ``colour``.
    * ``world/spurious-plain``: the scenes of both tests with empty corners.

    Image-text models: ``world/clip``, and ``world/truth``, which reads concept maps. Text-to-image generator:
    ``world/painter``. Captioner of images: ``world/tagger``.

    Args:
        folder: Folder of the weights; None takes :func:`weights_dir`.
    """
    place = Path(folder) if folder else weights_dir()

    def classifier(name: str, network: str, classes: tuple[str, ...] = CLASSES) -> None:
        architecture = ARCHITECTURES[network]
        factory = partial(_load, partial(architecture.build, len(classes)), place / f"{name}.safetensors")
        register_model(f"world/{name}", factory, architecture.layers, PREPROCESS, classes=classes)

    for name in ARCHITECTURES:
        classifier(name, name)
    for name in RANDOM_CONTROLS:
        architecture = ARCHITECTURES[name]
        register_model(f"world/{name}-random", partial(_random, name), architecture.layers, PREPROCESS, classes=CLASSES)
    planted = partial(_load, PlantedNet, place / "planted.safetensors")
    register_model("world/planted", planted, ("planted",), PREPROCESS, classes=planted_concepts)
    superposed = partial(_load, SuperposedNet, place / "superposed.safetensors")
    layers = ("planted", "superposed")
    register_model("world/superposed", superposed, layers, PREPROCESS, classes=superposed_concepts)
    encoder = partial(_load, EncoderNet, place / "encoder.safetensors")
    register_encoder("world", encoder, LAYERS, size=SIDE, mean=MEAN, std=STD, architecture=EncoderNet)
    for (network, dataset), name in CLASSIFIERS.items():
        if dataset == "places":
            classifier(name.removeprefix("world/"), network, PLACES)
    for name in GENERATORS.values():
        painter = partial(_load, SceneGenerator, place / f"{name.removeprefix('world/')}.safetensors")
        register_model(name, painter, GENERATOR_LAYERS, PREPROCESS, images=as_they_are)
    register_groups("world", groups_of(CLASSIFIERS, GENERATORS))
    register_splits(splits_of(CLASSIFIERS, GENERATORS, {("vit", "objects"): "world/vit"}, "world"))
    for name, (network, _, _) in MISLED.items():
        for own in misled_names(name):
            classifier(own, network)
    for pair in paired_names():
        for own in pair:
            classifier(own, own.split("-")[0])
    words = [CONCEPT[name].synonyms[0] for name in NAMES]
    register_image_text("world/truth", partial(ConceptTruth, NAMES, concepts_in, WORLD_DIGEST), words)
    register_image_text("world/clip", partial(_image_text, place / "clip"), words)
    register_generator("world/painter", ScenePainter)
    eyes = partial(_load, EncoderNet, place / "encoder.safetensors", None)
    register_image_captioner("world/tagger", partial(SceneTagger, eyes))
    for split, size in (("train", PROBE_SIZE), ("probe", PROBE_SIZE), ("heldout", HELDOUT_SIZE)):
        register_probe(f"world/{split}", partial(WorldProbe, split, size))
        register_probe(f"world/{split}-codes", partial(_codes, split, size))

    register_probe("world/spurious-plain", partial(WorldProbe, "heldout", SPURIOUS_TEST_SIZE))
    for kind in filter(None, SPURIOUS):
        like = partial(WorldProbe, spurious=kind, share=SPURIOUS_SHARE)
        register_probe(f"world/spurious-{kind}-train", partial(like, "train", PROBE_SIZE))
        register_probe(f"world/spurious-{kind}-validation", partial(like, "probe", SPURIOUS_SIZE))
        wrong = partial(WorldProbe, "heldout", SPURIOUS_TEST_SIZE, spurious=kind, misleading=True)
        register_probe(f"world/spurious-{kind}-test", wrong)


def _image_text(folder: Path) -> ImageText:
    if not (folder / "model.safetensors").is_file():
        raise MilanError(
            f"the built-in world's model of images and texts is missing at {folder}; make it with "
            "`python -m jobs.demo --clip`."
        )
    return ImageText(str(folder))


def _codes(split: str, size: int) -> CodeProbe:
    return CodeProbe(WorldProbe(split, size))


def _random(name: str, weights: str | None) -> nn.Module:
    if weights:
        raise MilanError(f"world/{name}-random has random weights by definition; leave out {weights}.")
    return random_network(name)


register()
