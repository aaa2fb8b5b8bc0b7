"""Evaluations and the paper's experiments; each returns rows of the scores table."""
