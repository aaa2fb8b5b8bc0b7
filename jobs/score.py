"""`python -m jobs.score`: see `milan-ray score --help`."""

from milan_ray.cli import job

job("score")
