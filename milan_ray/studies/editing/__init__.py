"""Editing of classifiers: removal of units that are found by their descriptions."""
