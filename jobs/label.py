"""`python -m jobs.label`: see `milan-ray label --help`."""

from milan_ray.cli import job

job("label")
