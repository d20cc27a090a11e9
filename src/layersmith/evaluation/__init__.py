"""How good a child is, compared with its parent."""
