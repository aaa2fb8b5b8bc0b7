"""`python -m jobs.compare`: see `milan-ray compare --help`."""

from milan_ray.cli import job

job("compare")
