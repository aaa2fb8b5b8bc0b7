"""Describe-and-Dissect (Bai et al., TMLR 2025): captions, candidate labels, and images generated for them."""
