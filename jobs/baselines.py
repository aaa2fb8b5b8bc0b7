"""`python -m jobs.baselines`: see `milan-ray baselines --help`."""

from milan_ray.cli import job

job("baselines")
