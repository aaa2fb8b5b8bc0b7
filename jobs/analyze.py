"""`python -m jobs.analyze`: see `milan-ray analyze --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["analyze", *sys.argv[1:]]))
