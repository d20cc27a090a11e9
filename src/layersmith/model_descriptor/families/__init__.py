"""Descriptors for families that experiment cannot tell. There is none; each would say here why it exists."""
