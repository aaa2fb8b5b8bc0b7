"""The paper's experiments and their like: each runs, counts and plots."""
