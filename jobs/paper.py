"""`python -m jobs.paper`: see `milan-ray paper --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["paper", *sys.argv[1:]]))
