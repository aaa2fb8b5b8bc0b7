"""`python -m jobs.plan`: see `milan-ray plan --help`."""

from milan_ray.cli import job

job("plan")
