"""Audits: units of pairs of networks, found by words in their descriptions."""
