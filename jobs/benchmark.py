"""`python -m jobs.benchmark`: see `milan-ray benchmark --help`."""

from milan_ray.cli import job

if __name__ == "__main__":  # the processes that some benchmarks start import this file again
    job("benchmark")
