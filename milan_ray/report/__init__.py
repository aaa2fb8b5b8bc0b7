"""Writes the static HTML report: every unit of a run directory, in files that open from disk."""

from milan_ray.report.site import write_report

__all__ = ["write_report"]
