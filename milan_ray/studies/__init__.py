"""The paper's experiments and similar studies: each has a run, statistics and a figure."""
