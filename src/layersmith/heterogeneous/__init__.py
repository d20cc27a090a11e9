"""Models whose layers differ: build, save, load, shard."""
