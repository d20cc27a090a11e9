"""Text to token rows: reading, mixtures, splits, and overlap between splits."""
