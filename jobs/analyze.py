"""`python -m jobs.analyze`: see `milan-ray analyze --help`."""

from milan_ray.cli import job

job("analyze")
