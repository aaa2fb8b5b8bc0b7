"""`python -m jobs.tune`: see `milan-ray tune --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["tune", *sys.argv[1:]]))
