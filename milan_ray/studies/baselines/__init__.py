"""Labelers compared on networks that the captioner was not trained on."""
