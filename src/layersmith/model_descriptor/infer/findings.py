"""Everything that experiments find out about a model, as it is kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer.cache import InCache
from layersmith.model_descriptor.infer.layers import Structure
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.subblocks import LayerKind, signature


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of all experiments on a model.

    Layers are of the same kind if they are built from the same classes and take their sizes from the same attributes.

    Attributes:
        structure: Names of the modules outside the layers.
        classes: Classes of the decoder layers.
        signatures, kinds, sizes, cache: One entry for each kind of layer, in the same order.
        of_layer: Kind of every layer.
        groups: Parameter outside the layers to ``"embedding"`` or ``"lm_head"``.
        remote_code: Whether the model's classes come with a checkpoint.
        appends: Whether layers append to the cache in turn, so that there can be no gap in it.
        widths: For every layer the widths of its FFN or experts and of its shared experts, by its weights.
        mixers: For every layer the fields of a ``MambaConfig`` for its mixer; None if it has none or they are unknown.
        notes: What is not offered, and why.
        config: The config that was examined. It is not kept on disk.
    """

    structure: Structure
    classes: tuple[type[nn.Module], ...]
    signatures: tuple[Any, ...]
    kinds: tuple[LayerKind, ...]
    sizes: tuple[Sizes, ...]
    cache: tuple[InCache, ...]
    of_layer: tuple[int, ...]
    groups: dict[str, str]
    remote_code: bool
    appends: bool
    widths: tuple[tuple[int | None, int | None], ...]
    mixers: tuple[dict[str, int] | None, ...]
    notes: tuple[str, ...]
    config: PretrainedConfig | None = field(default=None, repr=False, compare=False)

    def kind_of(self, layer: nn.Module) -> LayerKind:
        """The kind of a layer as its class builds it, whatever its sizes; some of its modules may be replaced."""
        return self.kinds[self.number_of_kind(layer)]

    def number_of_kind(self, layer: nn.Module) -> int:
        """The index of a layer's kind.

        Raises:
            UnsupportedModel: The layer is of none of the kinds.
        """
        seen = signature(layer)
        if seen in self.signatures:
            return self.signatures.index(seen)
        modules = dict(seen[1])
        agreement = {
            k: sum(modules.get(name) == cls for name, cls in known[1])
            for k, known in enumerate(self.signatures)
            if known[0] == seen[0] and all(name in modules for name, _ in known[1] if "." not in name)
        }
        if not agreement:
            raise UnsupportedModel(f"{type(layer).__name__} is not a decoder layer of this family.")
        return max(agreement, key=lambda k: agreement[k])
