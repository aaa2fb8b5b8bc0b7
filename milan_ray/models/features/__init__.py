"""Feature sets: directions of a layer's output that are dissected like units."""
