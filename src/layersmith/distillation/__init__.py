"""Training: a whole child against its parent."""
