"""Benchmarks of the stages against the bare computation that any implementation needs (BENCHMARKS.md)."""

BENCHMARKS = (
    "describe", "effects", "encode", "end-to-end", "exemplars", "features", "feeding", "gpu", "merge", "ratings",
    "ray-overhead", "report", "scale", "tune", "versions", "zoo",
)  # fmt: skip
"""Names of the benchmarks; each is implemented in the module of that name, with ``_`` for ``-``."""
