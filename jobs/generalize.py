"""`python -m jobs.generalize`: see `milan-ray generalize --help`."""

from milan_ray.cli import job

job("generalize")
