"""`python -m jobs.benchmark`: see `milan-ray benchmark --help`."""

import sys

from milan_ray.cli import main

if __name__ == "__main__":  # the processes that some benchmarks start import this file again
    sys.exit(main(["benchmark", *sys.argv[1:]]))
