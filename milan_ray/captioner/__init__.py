"""The captioner: encoder, attention decoder p(d|E), language model p(d), beam search and re-ranking (paper §3)."""
