"""The world judges labels of its networks' units."""
