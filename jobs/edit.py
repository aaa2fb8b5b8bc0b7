"""`python -m jobs.edit`: see `milan-ray edit --help`."""

from milan_ray.cli import job

job("edit")
