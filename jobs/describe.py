"""`python -m jobs.describe`: see `milan-ray describe --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["describe", *sys.argv[1:]]))
