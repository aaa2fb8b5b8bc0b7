"""Where the images come from that a model is probed with."""
