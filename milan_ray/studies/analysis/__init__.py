"""How much units matter, by their descriptions: accuracy as units are ablated."""
