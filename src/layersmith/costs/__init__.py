"""What an alternative takes."""
