"""`python -m jobs.audit`: see `milan-ray audit --help`."""

from milan_ray.cli import job

job("audit")
