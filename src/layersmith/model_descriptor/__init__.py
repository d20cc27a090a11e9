"""What the code knows about an architecture: the descriptor interface, the registry, and inference by experiment."""
