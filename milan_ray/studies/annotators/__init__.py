"""Statistics of annotations."""
