"""Pure kernels: running top-k, levels, masks, and how shards fold into a layer's answer."""
