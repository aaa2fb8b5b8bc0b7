"""Units ablated in the order of what is said of them."""
