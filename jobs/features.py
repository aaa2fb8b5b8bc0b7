"""`python -m jobs.features`: see `milan-ray features --help`."""

from milan_ray.cli import job

job("features")
