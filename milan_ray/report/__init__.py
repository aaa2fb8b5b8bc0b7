"""The static HTML report: every unit of a run directory, readable from disk."""

from milan_ray.report.site import write_report

__all__ = ["write_report"]
