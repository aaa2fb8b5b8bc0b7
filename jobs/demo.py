"""`python -m jobs.demo`: see `milan-ray demo --help`."""

from milan_ray.cli import job

job("demo")
