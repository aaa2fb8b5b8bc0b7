"""`python -m jobs.effects`: see `milan-ray effects --help`."""

from milan_ray.cli import job

job("effects")
