"""`python -m jobs.edit`: see `milan-ray edit --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["edit", *sys.argv[1:]]))
