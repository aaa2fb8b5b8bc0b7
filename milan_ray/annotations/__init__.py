"""MILANNOTATIONS in and out: published sets of exemplars with people's annotations."""
