"""The axes along which a layer can shrink: found by experiment, proved on the parent's weights."""
