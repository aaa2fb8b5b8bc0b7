"""What our stages cost beside the bare computation that nobody can avoid (BENCHMARKS.md)."""

BENCHMARKS = ("exemplars", "encode", "describe", "end-to-end", "merge", "ray-overhead", "report", "tune")
"""Names of the benchmarks; each is the module of this name, with ``_`` for ``-``."""
