"""One HTML page that tells what a run gave."""
