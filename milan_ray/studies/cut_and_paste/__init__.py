"""Cut-and-paste adversarial images for units that are chosen by their descriptions."""
