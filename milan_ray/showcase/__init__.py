"""All that is about the built-in world: the demo, its judges, the paper's page."""
