"""What is fitted, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.errors import MilanError
from milan_ray.models.features.sae import SaeConfig
from milan_ray.names import SIGN, checked_name

PCA, NMF, TOPK, JUMPRELU = METHODS = ("pca", "nmf", "topk-sae", "jumprelu-sae")
"""Names of the methods."""

SAES = (TOPK, JUMPRELU)
"""Those that train sparse autoencoders."""

FEW = 16
"""Components where nothing is said, and no more than the layer's units."""

EXPANSION = 8
"""Features of a sparse autoencoder where nothing is said, as a multiple of the layer's units."""

EPOCHS = {NMF: 20, TOPK: 4, JUMPRELU: 4}
"""Method → passes over the images where nothing is said."""


@dataclass(frozen=True)
class FitConfig:
    """How features are fitted.

    Attributes:
        method: One of :data:`METHODS`.
        widths: Numbers of features, a set for each; empty for a number by the method.
        k: Features kept at a position by ``topk-sae``, or aimed at by ``jumprelu-sae``.
        epochs: Passes over the images; None for a number by the method.
        seed: Of weights, and of the order of images and positions.
        held_out: Share of the images, by a hash of their ids, that nothing is fitted to.
        name: Name of the set, with ``-WIDTH`` where there are several; None for the method's and the width.
        out: Where the sets are written, a folder or a URI; empty for the run directory's ``features/MODEL/LAYER``.
        sae: How sparse autoencoders are trained.
        workers: Data-parallel workers of that training.
    """

    method: str
    widths: tuple[int, ...] = ()
    k: int = 32
    epochs: int | None = None
    seed: int = 0
    held_out: float = 0.1
    name: str | None = None
    out: str = ""
    sae: SaeConfig = field(default_factory=SaeConfig)
    workers: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MilanError(f"no method {self.method!r}: give one of {', '.join(METHODS)}.")
        if any(width < 1 for width in self.widths):
            raise MilanError(f"--width {min(self.widths)}: give numbers of at least 1.")
        if not 0 <= self.held_out < 1:
            raise MilanError(f"--held-out {self.held_out:g} leaves no images to fit to: give a share below 1.")
        if self.name is not None and SIGN in checked_name("a feature set", self.name):
            raise MilanError(f"a feature set cannot be called {self.name!r}: its name may not contain {SIGN!r}.")

    @property
    def passes(self) -> int:
        """Passes over the images, besides the one that takes their moments."""
        return self.epochs or EPOCHS.get(self.method, 1)

    def names(self, units: int) -> dict[str, int]:
        """Name → number of features of each set of a layer with some units.

        Raises:
            MilanError: A number does not fit the layer, or the number of features kept.
        """
        usual = EXPANSION * units if self.method in SAES else min(units, FEW)
        widths = list(dict.fromkeys(self.widths)) or [usual]
        for width in widths:
            if self.method == PCA and width > units:
                raise MilanError(f"--width {width}: a layer of {units} units has {units} principal components at most.")
            if self.method in SAES and self.k > width:
                raise MilanError(
                    f"--k {self.k} of --width {width}: no more features can be on than there are; give a smaller --k."
                )
        if self.name is None:
            return {f"{self.method}-{width}": width for width in widths}
        return {self.name if len(widths) == 1 else f"{self.name}-{width}": width for width in widths}

    def identity(self, width: int) -> dict[str, object]:
        """What decides a set of some features, besides the layer's outputs."""
        own: dict[str, object] = {"method": self.method, "width": width, "held_out": self.held_out}
        if self.method != PCA:
            own |= {"epochs": self.passes, "seed": self.seed}
        if self.method in SAES:
            own |= {"k": self.k, "training": self.sae.identity()}
        return own


@dataclass(frozen=True)
class FitJob:
    """What features are fitted to.

    Attributes:
        model: The network, with one layer.
        probe: The images.
        config: How.
    """

    model: ModelRef
    probe: ProbeRef
    config: FitConfig
