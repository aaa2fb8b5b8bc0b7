"""Accuracy of classifiers with units switched off."""
