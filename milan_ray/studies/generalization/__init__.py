"""Captioners on networks, tasks and data sets that they were not trained on."""
