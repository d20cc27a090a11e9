"""What is the attention of a decoder layer and what its FFN: the nouns in which experiments give their answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layersmith.model_descriptor.experiment import Outcome

Record = dict[str, Any]


@dataclass(frozen=True)
class Subblock:
    """One subblock of a kind of layer; names are relative to the layer.

    Attributes:
        modules: The modules that compute it.
        replaced: Each module that the no-op replaces, and the record of its replacement (see ``make_replacement``);
            empty if the subblock cannot be removed.
        refuted: The experiment that shows why it cannot be removed; None if it can.
        stays: Whether the no-op removes only the last part of the subblock, because other layers use the rest.
    """

    modules: tuple[str, ...] = ()
    replaced: tuple[tuple[str, Record], ...] = ()
    refuted: Outcome | None = None
    stays: bool = False

    @property
    def removable(self) -> bool:
        return bool(self.replaced)

    @property
    def reason(self) -> str:
        """Why it cannot be removed; empty if it can."""
        return "" if self.refuted is None else self.refuted.reason


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its two subblocks, and to which of them each weight belongs.

    Attributes:
        attention, ffn: The subblocks; None where the kind has no such subblock.
        shared: Modules that are needed as long as either subblock is there, e.g. a norm before parallel branches.
        owners: Weight of the layer to ``"attention"`` or ``"ffn"``.
    """

    attention: Subblock | None
    ffn: Subblock | None
    shared: tuple[tuple[str, Record], ...]
    owners: dict[str, str]


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """Classes and names of a layer's modules, without sizes: equal for layers of the same kind.

    Of the members of a list, e.g. of experts, only the first few count.
    """
    modules = tuple(
        (name, type(module).__qualname__)
        for name, module in layer.named_modules()
        if not any(part.isdigit() and int(part) > 3 for part in name.split("."))
    )
    parameters = tuple(n for n, _ in layer.named_parameters() if not any(p.isdigit() for p in n.split(".")))
    return type(layer).__qualname__, modules, parameters
