"""`python -m jobs.diff`: see `milan-ray diff --help`."""

from milan_ray.cli import job

job("diff")
