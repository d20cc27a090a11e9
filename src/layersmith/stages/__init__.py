"""The stages of a run, one module each, and the commands on a finished run."""
