"""Scores: how much the loss increases if one alternative replaces its parent subblock."""
