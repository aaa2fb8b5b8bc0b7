"""The stages on Ray. This is the only package that imports it."""
