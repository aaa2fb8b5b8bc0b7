"""`python -m jobs.exemplars`: see `milan-ray exemplars --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["exemplars", *sys.argv[1:]]))
