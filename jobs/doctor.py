"""`python -m jobs.doctor`: see `milan-ray doctor --help`."""

from milan_ray.cli import job

job("doctor")
