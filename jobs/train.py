"""`python -m jobs.train`: see `milan-ray train --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
