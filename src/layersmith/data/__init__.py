"""Text to token rows."""
