"""What Python users call: dissect, the captioner."""
