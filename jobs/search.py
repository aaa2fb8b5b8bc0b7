"""`python -m jobs.search`: see `milan-ray search --help`."""

from milan_ray.cli import job

job("search")
