"""Labelers beside each other."""
