"""Configuration of Describe-and-Dissect, and the inputs that decide the generated images."""

from __future__ import annotations

from dataclasses import dataclass, field

from milan_ray.config import config_hash
from milan_ray.engine import references
from milan_ray.errors import MilanError, unknown_name
from milan_ray.exemplars.pooled import maxima, means
from milan_ray.labelers.dnd.crops import MOST
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.labelers.dnd.summaries import FrequentPhrases, Prompted, Summariser
from milan_ray.models.chat import Endpoint, Limits, LocalChat
from milan_ray.models.folders import find_language_model
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_captions import ImageCaptioner, ImageCaptionerRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.plugins import load_plugins
from milan_ray.stages.embeddings import KERNEL_VERSION as EMBEDDINGS_VERSION
from milan_ray.storage import Storage

KERNEL_VERSION = "dnd-1"

FINDING_VERSION = "finding-1"
"""Part of the hash where images are found; increased when other ones are found."""

POOLINGS = {"mean": means, "max": maxima}
"""Column of ``pooled`` → the function that reduces a unit's map of an image to one number."""

UNIT_CAPTIONER = "milan/"
"""Prefix that makes a captioner of units caption whole images."""

FREQUENT = "frequent"
"""Name of the summariser that counts phrases."""


@dataclass(frozen=True)
class SummariserRef:
    """A reference to a summariser, which turns captions into candidate labels; workers load it.

    Attributes:
        name: :data:`FREQUENT`, a language model as :func:`~milan_ray.models.folders.find_language_model` takes it, or a
            server's address.
        model: The model's name on the server.
        temperature: Of a language model's answers.
        limits: How a server may be used.
    """

    name: str = FREQUENT
    model: str | None = None
    temperature: float = 0.3
    limits: Limits = field(default_factory=Limits)

    @property
    def is_server(self) -> bool:
        """Whether it is a server; only the driver sends requests to it, so its key stays in this process."""
        return "://" in self.name

    def load(self, storage: Storage) -> Summariser:
        """Builds it, on the CPU.

        Args:
            storage: The run directory, which keeps a server's answers.

        Raises:
            MilanError: There is none.
        """
        if self.name == FREQUENT:
            return FrequentPhrases()
        if not self.is_server:
            return Prompted(LocalChat(find_language_model(self.name), self.temperature))
        if self.model is None:
            raise MilanError(f"{self.name} may serve several models: name one with --llm-model.")
        return Prompted(Endpoint(self.name, self.model, storage, self.temperature, self.limits))


@dataclass(frozen=True)
class DndConfig:
    """How units are described and dissected.

    Attributes:
        labeler: How candidates are scored, and the partition's name.
        captioner: Says what images show.
        summariser: Turns captions into candidates.
        generator: Draws images of candidates; None finds them among the probe's.
        embedder: Compares images, and finds them; None where nothing of this is needed.
        images: Exemplars per unit, crops included.
        crops: Attention crops per image at most; 0 for none.
        pooling: A key of :data:`POOLINGS`: the method's is ``mean``, which says little of units with signed outputs.
        drawn: Images per candidate, drawn or found.
        prompt: What the generator is asked for; ``{}`` stands for the candidate.
        seed: Seed of the drawn images.
        plugins: Modules that register any of these.
    """

    labeler: DescribeAndDissect
    captioner: ImageCaptionerRef
    summariser: SummariserRef
    generator: GeneratorRef | None
    embedder: ImageTextRef | None = None
    images: int = 10
    crops: int = MOST
    pooling: str = "mean"
    drawn: int = 10
    prompt: str = "a realistic photograph of {}"
    seed: int = 0
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise unknown_name("pooling", self.pooling, POOLINGS)
        if "{}" not in self.prompt:
            raise MilanError(
                f"the prompt {self.prompt!r} has no {{}} where the candidate label goes: give one with it."
            )
        if self.generator is None and self.embedder is None:
            raise MilanError("images of the probe are found by a model of images and texts: name one with --clip.")
        if self.labeler.compares and self.embedder is None:
            raise MilanError(
                f"scoring by {self.labeler.scoring} compares images: name a model of images and texts with --clip, or "
                "score by topk-squared-mean."
            )


def image_captioner(storage: Storage, how: DndConfig) -> ImageCaptioner:
    """Loads the captioner of images.

    Raises:
        MilanError: It is missing or damaged.
    """
    name = how.captioner.name
    if not name.startswith(UNIT_CAPTIONER):
        return references.load(how.captioner, how.plugins)
    # Not above: it brings spaCy, which takes seconds to import and all other workers do without.
    from milan_ray.labelers.dnd.unit_captioner import WholeImages
    from milan_ray.stages.captioners import load_captioner

    load_plugins(how.plugins)
    captioner = load_captioner(storage, name.removeprefix(UNIT_CAPTIONER))
    return WholeImages(name, captioner, captioner.encoder())


def drawings_identity(storage: Storage, how: DndConfig) -> dict[str, object]:
    """All inputs that decide drawings, except the exemplars. Loads every model, so that a missing one is found early.

    Raises:
        MilanError: A captioner, summariser, generator or model of images and texts is missing.
    """
    embedder = None if how.embedder is None else references.load(how.embedder, how.plugins)
    if embedder is not None and embedder.view is None:
        raise MilanError(
            "a model that reads a probe's concept maps cannot look at drawn images: name a CLIP or SigLIP model with "
            "--clip, or score by topk-squared-mean."
        )
    identity = {
        "kernel": KERNEL_VERSION,
        "captioner": config_hash(image_captioner(storage, how).identity()),
        "summariser": config_hash(how.summariser.load(storage).identity()),
        "embedder": None if embedder is None else config_hash(embedder.identity()),
        "augmentation": {"images": how.images, "crops": how.crops, "pooling": how.pooling},
    }
    if how.generator is None:
        assert embedder is not None
        versions = {"finding": FINDING_VERSION, "embeddings": EMBEDDINGS_VERSION}
        return {**identity, **versions, "texts": config_hash(embedder.text_identity()), "images": how.drawn}
    return {
        **identity,
        "generator": config_hash(references.load(how.generator, how.plugins).identity()),
        "drawing": {"images": how.drawn, "prompt": how.prompt, "seed": how.seed},
    }
