"""`python -m jobs.demo`: see `milan-ray demo --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
