"""`python -m jobs.search`: see `milan-ray search --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["search", *sys.argv[1:]]))
