"""`python -m jobs.status`: see `milan-ray status --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["status", *sys.argv[1:]]))
