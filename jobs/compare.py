"""`python -m jobs.compare`: see `milan-ray compare --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["compare", *sys.argv[1:]]))
