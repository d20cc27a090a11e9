"""The modules that stand in for what a layer no longer has, or for a layer that is not here.

Those that a child needs live in the file that travels with it, so that it behaves the same with and without layersmith.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from layersmith.modeling_layersmith import MatchingZeros, Same, return_tuple_of_size

__all__ = ["DummyBlock", "MatchingZeros", "Same", "return_tuple_of_size"]


class DummyBlock(nn.Module):
    """A decoder layer that is not here: passes its input on and has no weights."""

    def __init__(self, original_layer: nn.Module, block_index: int):
        super().__init__()
        self.block_index = block_index
        # What a model's loop reads from its layers, e.g. ``attention_type``; with some families it is computed.
        values = dict(vars(original_layer))
        for cls in type(original_layer).__mro__[: type(original_layer).__mro__.index(nn.Module)]:
            for name, attribute in vars(cls).items():
                if isinstance(attribute, property):
                    with suppress(Exception):  # whatever a family's own code raises
                        values.setdefault(name, getattr(original_layer, name))
        for name, value in values.items():
            if not name.startswith("_") and isinstance(value, str | int | bool) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states
