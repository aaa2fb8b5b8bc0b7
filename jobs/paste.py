"""`python -m jobs.paste`: see `milan-ray paste --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["paste", *sys.argv[1:]]))
