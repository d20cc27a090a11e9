"""What a model family looks like: the descriptor interface, the registry, and what is found by experiment."""
