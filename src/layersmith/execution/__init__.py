"""Running a model: whole, layer by layer, from the disk, or with some modules replaced."""
