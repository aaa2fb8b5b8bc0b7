"""`python -m jobs.annotations`: see `milan-ray annotations --help`."""

from milan_ray.cli import job

job("annotations")
