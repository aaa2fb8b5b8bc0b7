"""Reads, collects and writes MILANNOTATIONS: published sets of exemplars with human annotations."""
