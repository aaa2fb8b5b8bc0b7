"""`python -m jobs.label`: see `milan-ray label --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["label", *sys.argv[1:]]))
