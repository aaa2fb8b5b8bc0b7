"""Units switched off."""
