"""`python -m jobs.exemplars`: see `milan-ray exemplars --help`."""

from milan_ray.cli import job

job("exemplars")
