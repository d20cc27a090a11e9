"""What a model family looks like: the descriptor interface, the registry, and the families written by hand."""
