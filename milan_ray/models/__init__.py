"""Models to dissect: a registry by name, the preprocessing of images, and the outputs of layers."""
