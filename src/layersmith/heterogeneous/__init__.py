"""Models whose layers differ: build, save, load and shard them."""
