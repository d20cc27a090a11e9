"""How a run is kept: its folder, its files, its processes, its progress."""
