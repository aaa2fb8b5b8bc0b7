"""`python -m jobs.dnd`: see `milan-ray dnd --help`."""

from milan_ray.cli import job

job("dnd")
