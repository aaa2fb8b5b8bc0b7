"""Classifiers without units found by words."""
