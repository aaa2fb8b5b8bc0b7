"""What a user says of a file of features that the file does not say itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from milan_ray.errors import MilanError

FORMATS = ("saelens", "prisma", "saev", "overcomplete", "sparsify", "dictionary_learning", "matrix")
"""Names of the formats."""


@dataclass(frozen=True)
class ReadingOptions:
    """How to read a file of features; None leaves it to the file.

    Attributes:
        format: One of :data:`FORMATS`; by default, the files say it.
        width: C, the units of the layer that the features are of. A file of another width is refused.
        architecture: The kind of dictionary in the project's own words, such as ``gated`` or ``BatchTopKSAE``.
        activation: Name of the activation, such as ``relu`` or ``topk``.
        k: Features that a TopK activation keeps.
        threshold: The value above which the features of a BatchTopK activation are on.
        normalisation: ``none``, ``constant_norm_rescale`` or ``layer_norm``: what is done to a layer's output first.
        scale: What the layer's outputs were multiplied by in training (SAELens' ``expected_average_only_in``); 1 where
            the weights contain it.
        subtract_decoder_bias: Whether the decoder's bias is subtracted from the input.
        decoder_normalisation: ``l2``, ``max_l2``, ``l1``, ``max_l1`` or ``identity``: what overcomplete does to the
            rows of its dictionary when it uses them.
        transposed: Whether a matrix has a column per feature; by default a row.
    """

    format: str | None = None
    width: int | None = None
    architecture: str | None = None
    activation: str | None = None
    k: int | None = None
    threshold: float | None = None
    normalisation: str | None = None
    scale: float | None = None
    subtract_decoder_bias: bool | None = None
    decoder_normalisation: str | None = None
    transposed: bool | None = None

    def __post_init__(self) -> None:
        """Checks the values, which may come from a file that people write.

        Raises:
            MilanError: One is of another type, or a number that cannot be.
        """
        for name, value in self.given().items():
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            good, wanted = {
                "width": (type(value) is int and number >= 1, "a whole number from 1"),
                "k": (type(value) is int and number >= 1, "a whole number from 1"),
                "threshold": (math.isfinite(number), "a number"),
                "scale": (0 < number < math.inf, "a number above 0"),
                "subtract_decoder_bias": (type(value) is bool, "true or false"),
                "transposed": (type(value) is bool, "true or false"),
            }.get(name, (isinstance(value, str), "a text"))
            if not good:
                raise MilanError(f"{name} of features is {value!r}: give {wanted}.")

    def given(self) -> dict[str, object]:
        """The options that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
