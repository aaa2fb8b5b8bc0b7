"""`python -m jobs.diff`: see `milan-ray diff --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["diff", *sys.argv[1:]]))
