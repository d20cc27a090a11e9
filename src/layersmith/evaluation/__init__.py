"""How good a child is beside its parent."""
