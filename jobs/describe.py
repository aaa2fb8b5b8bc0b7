"""`python -m jobs.describe`: see `milan-ray describe --help`."""

from milan_ray.cli import job

job("describe")
