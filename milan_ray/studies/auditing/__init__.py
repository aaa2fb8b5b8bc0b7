"""Units of two networks found by words."""
