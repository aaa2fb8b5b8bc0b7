"""`python -m jobs.paste`: see `milan-ray paste --help`."""

from milan_ray.cli import job

job("paste")
