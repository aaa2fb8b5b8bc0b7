"""Pure kernels: running top-k, levels, masks, and the merging of shards into a layer's result."""
