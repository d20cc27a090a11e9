"""The library: all the alternatives of all the layers, and the statistics that they are made from."""
