"""The axes along which a layer can shrink: identified by experiment, proved on the parent's weights."""
