"""`python -m jobs.models`: see `milan-ray models --help`."""

from milan_ray.cli import job

job("models")
