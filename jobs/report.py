"""`python -m jobs.report`: see `milan-ray report --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
