"""Other methods of pruning without training, each written from its paper, on layersmith's execution and library.

A method returns a :class:`~benchmarks.rivals.problem.Choice`: which channels and heads of every layer stay, or which
subblocks. :mod:`.refit` gives any choice layersmith's closed-form refits, so that choices can be compared apart from
weight updates. ``benchmarks/quality.py`` runs them all.
"""
