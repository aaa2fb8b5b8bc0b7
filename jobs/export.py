"""`python -m jobs.export`: see `milan-ray export --help`."""

from milan_ray.cli import job

job("export")
