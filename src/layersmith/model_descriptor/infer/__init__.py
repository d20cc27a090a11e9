"""The descriptor of any model, found by experiment."""
