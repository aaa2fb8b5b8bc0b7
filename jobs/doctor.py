"""`python -m jobs.doctor`: see `milan-ray doctor --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
