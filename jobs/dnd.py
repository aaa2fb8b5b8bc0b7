"""`python -m jobs.dnd`: see `milan-ray dnd --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["dnd", *sys.argv[1:]]))
