"""All labelers on a network that none was trained on."""
