"""Descriptors written by hand."""
