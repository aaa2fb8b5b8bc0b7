"""milan_ray: natural-language descriptions of every unit of every vision model, on Ray."""

__version__ = "0.1.0"
