"""All that experiment finds of a model, as it is kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer.cache import KeptState, KeptTokens
from layersmith.model_descriptor.infer.layers import Structure
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.subblocks import LayerKind, signature


@dataclass(frozen=True)
class Findings:
    """All that experiment found of a model.

    Attributes:
        structure: names outside the layers.
        classes: of the decoder layers.
        signatures, kinds, sizes: of every kind of layer, in the same order.
        of_layer: the kind of every layer.
        groups: parameter outside the layers to ``"embedding"`` or ``"lm_head"``.
        remote_code: whether its classes come with a checkpoint.
        notes: what is not offered, and why.
        widths: of every layer the width of its FFN or experts, and of its shared experts, as its weights have it.
        stateful: of every kind, whether its mixer keeps a state of fixed size and no keys and values.
        cached: of every kind, the numbers in the cache for each one of a value head: 2 where keys are as long.
        latent: of every kind, the numbers in the cache for a token if they are not one by one the heads'.
        empty: of every kind, whether it keeps nothing in the cache.
        states: of every kind, what it keeps in the cache that does not grow with the tokens.
        mixers: of every layer the sizes of its Mamba or linear-attention mixer, in the words of its config record.
        appends: whether layers append to the cache in turn, so that it bears no gap.
        slots: of every kind, the slots of the cache that a layer has, one for each of its attentions.
        beside: of every kind, what it keeps of every token in a slot beside keys and values.
        for_each_query: of every kind, whether it keeps keys and values once for each query head.
        more_in_cache: of every kind, whether its cache holds what is not counted, so that its size is estimated.
    """

    structure: Structure
    classes: tuple[type[nn.Module], ...]
    signatures: tuple[Any, ...]
    kinds: tuple[LayerKind, ...]
    sizes: tuple[Sizes, ...]
    of_layer: tuple[int, ...]
    groups: dict[str, str]
    remote_code: bool
    notes: tuple[str, ...] = ()
    widths: tuple[tuple[int | None, int | None], ...] = ()
    stateful: tuple[bool, ...] = ()
    cached: tuple[float, ...] = ()
    latent: tuple[int | None, ...] = ()
    empty: tuple[bool, ...] = ()
    states: tuple[tuple[KeptState, ...], ...] = ()
    mixers: tuple[dict[str, int] | None, ...] = ()
    appends: bool = False
    slots: tuple[int, ...] = ()
    beside: tuple[tuple[KeptTokens, ...], ...] = ()
    for_each_query: tuple[bool, ...] = ()
    more_in_cache: tuple[bool, ...] = ()
    config: PretrainedConfig | None = field(default=None, repr=False, compare=False)

    def kind_of(self, layer: nn.Module) -> LayerKind:
        """The kind of a layer as its class builds it, whatever its sizes; some of its modules may be replaced."""
        return self.kinds[self.number_of_kind(layer)]

    def number_of_kind(self, layer: nn.Module) -> int:
        """The place of a layer's kind among all."""
        own = signature(layer)
        if own in self.signatures:
            return self.signatures.index(own)
        modules = dict(own[1])
        agreement = {
            k: sum(modules.get(name) == cls for name, cls in known[1])
            for k, known in enumerate(self.signatures)
            if known[0] == own[0] and all(name in modules for name, _ in known[1] if "." not in name)
        }
        if not agreement:
            raise UnsupportedModel(f"{type(layer).__name__} is not a decoder layer of this family.")
        return max(agreement, key=lambda k: agreement[k])
