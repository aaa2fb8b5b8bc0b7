"""`python -m jobs.score`: see `milan-ray score --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["score", *sys.argv[1:]]))
