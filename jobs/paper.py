"""`python -m jobs.paper`: see `milan-ray paper --help`."""

from milan_ray.cli import job

job("paper")
