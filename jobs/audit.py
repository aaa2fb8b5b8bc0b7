"""`python -m jobs.audit`: see `milan-ray audit --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["audit", *sys.argv[1:]]))
