"""How a run is kept: its folder, stages, artifacts, processes and progress."""
