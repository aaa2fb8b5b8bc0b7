"""`python -m jobs.tune`: see `milan-ray tune --help`."""

from milan_ray.cli import job

job("tune")
