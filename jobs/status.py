"""`python -m jobs.status`: see `milan-ray status --help`."""

from milan_ray.cli import job

job("status")
