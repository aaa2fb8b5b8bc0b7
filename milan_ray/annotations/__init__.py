"""MILANNOTATIONS in and out: published sets of exemplars with people's annotations (REFERENCE §1.4, §7)."""
