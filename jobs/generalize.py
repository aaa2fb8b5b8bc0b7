"""`python -m jobs.generalize`: see `milan-ray generalize --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["generalize", *sys.argv[1:]]))
