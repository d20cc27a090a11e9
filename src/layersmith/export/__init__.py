"""Export: write a child in another layout, and prove that the target reads the same model.

:func:`layersmith.export.run.export` does it; :mod:`layersmith.export.target` has the table of targets and says how to
add one.
"""
