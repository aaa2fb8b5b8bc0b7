"""`python -m jobs.plan`: see `milan-ray plan --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["plan", *sys.argv[1:]]))
