"""The library: all alternatives of all layers, and the importance statistics that they are made from."""
