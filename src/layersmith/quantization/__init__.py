"""Number formats of weights: what they cost, how weights are rounded to them, and how they are stored."""
