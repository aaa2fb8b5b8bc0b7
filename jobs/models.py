"""`python -m jobs.models`: see `milan-ray models --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["models", *sys.argv[1:]]))
