"""The world as a plug-in."""
