"""The modules that stand in for what a layer no longer has.

They live in the file that travels with every child, so that a child behaves the same with and without layersmith.
"""

from layersmith.heterogeneous.modeling_layersmith import MatchingZeros, Same, return_tuple_of_size

__all__ = ["MatchingZeros", "Same", "return_tuple_of_size"]
