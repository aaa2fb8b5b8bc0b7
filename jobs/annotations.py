"""`python -m jobs.annotations`: see `milan-ray annotations --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["annotations", *sys.argv[1:]]))
