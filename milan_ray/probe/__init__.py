"""Sources of the images that a model is probed with."""
