"""Labelers: methods that describe units, behind one protocol."""
