"""`python -m jobs.export`: see `milan-ray export --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
