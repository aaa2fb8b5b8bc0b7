"""Ways to label units, all behind one protocol."""
