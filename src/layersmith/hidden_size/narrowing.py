"""How channels of the residual stream are removed from weights, once it is proved that they can be.

Shapes: D hidden, D' the smaller hidden size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from layersmith.hidden_size.config import Carrier, HiddenSize, carriers, template
from layersmith.model_descriptor.experiment import Shapes

Tensors = Mapping[str, torch.Tensor]
Carriers = tuple[Carrier, ...]


@dataclass(frozen=True)
class Factor:
    """What a weight is multiplied with where D channels become D'.

    Attributes:
        power: The weight becomes ``(w + offset) * sqrt(D / D') ** power - offset``.
        offset: 1 for the weights of norms that multiply with ``1 + w``, else 0.
    """

    power: int
    offset: float = 0.0

    def of(self, weight: torch.Tensor, ratio: float) -> torch.Tensor:
        """The multiplied weight in float32; ``ratio`` is D / D'."""
        return (weight.float() + self.offset) * ratio ** (self.power / 2) - self.offset


@dataclass(frozen=True)
class Narrowing:
    """A proved way to remove channels of the residual stream.

    Attributes:
        hidden_size: How the config says the hidden size.
        interleaved: Weights, by their names without numbers of layers, in which all entries of a channel or head are
            neighbours.
        of_heads: Weights, by their names without numbers of layers, and dimensions of them that hold heads.
        factors: What weights are multiplied with, by their names without numbers of layers.
        centered: Whether it was proved only for streams in which the mean of all channels is zero.
    """

    hidden_size: HiddenSize
    interleaved: frozenset[str] = frozenset()
    of_heads: frozenset[tuple[str, int]] = frozenset()
    factors: Mapping[str, Factor] = field(default_factory=dict)
    centered: bool = False

    def carriers(self, large: Shapes, small: Shapes, hidden_size: int, size: int, head_size: int = 1) -> Carriers:
        """The dimensions of a model's weights that follow the hidden size; see :func:`carriers`."""
        return tuple(
            dataclasses.replace(
                carrier,
                interleaved=template(carrier.name) in self.interleaved,
                unit=head_size if (template(carrier.name), carrier.dim) in self.of_heads else 1,
            )
            for carrier in carriers(large, small, hidden_size, size)
        )

    def tensors(self, state: Tensors, of: Carriers, kept: Kept, hidden_size: int) -> dict[str, torch.Tensor]:
        """Weights without the channels that are not kept, multiplied with their factors, in their dtypes."""
        sliced = without_channels(state, of, kept, hidden_size)
        ratio = hidden_size / len(kept.channels)
        for name, weight in sliced.items():
            factor = self.factors.get(template(name))
            if factor is not None:
                sliced[name] = factor.of(weight, ratio).to(weight.dtype)
        return sliced


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a model.

    Attributes:
        channels: ``[D']``: the channels of the residual stream.
        heads: Layer, by the first number in the names of its weights, to the heads that stay in it.
    """

    channels: torch.Tensor
    heads: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, carrier: Carrier) -> torch.Tensor:
        """The channels or heads that stay in a dimension."""
        return self.channels if carrier.unit == 1 else self.heads[layer_of(carrier.name)]


def layer_of(name: str) -> int:
    """The first number in a name; -1 if it has none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1


def without_channels(state: Tensors, of: Carriers, kept: Kept, hidden_size: int) -> dict[str, torch.Tensor]:
    """A ``state_dict`` with only some channels of the residual stream, and some heads."""
    sliced = dict(state)
    for carrier in of:
        weight = sliced[carrier.name]
        entries = carrier.staying(kept.of(carrier), hidden_size).to(weight.device)
        sliced[carrier.name] = weight.index_select(carrier.dim, entries)
    return sliced
