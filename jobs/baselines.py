"""`python -m jobs.baselines`: see `milan-ray baselines --help`."""

import sys

from milan_ray.cli import main

sys.exit(main(["baselines", *sys.argv[1:]]))
