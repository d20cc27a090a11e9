"""Descriptors for families whose structure cannot be inferred by experiment. No family needs one at present."""
