"""Comparison of labelers on the same units."""
