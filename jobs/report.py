"""`python -m jobs.report`: see `milan-ray report --help`."""

from milan_ray.cli import job

job("report")
