"""tiermem: a KV cache larger than the GPU."""
