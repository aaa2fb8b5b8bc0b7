"""Describe-and-Dissect (docs/describe-and-dissect.md)."""
