"""A small code model that comes with layersmith, and the job that compresses it."""
