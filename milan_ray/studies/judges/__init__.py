"""The built-in world judges labels of its networks' units."""
