"""`python -m jobs.train`: see `milan-ray train --help`."""

from milan_ray.cli import job

job("train")
