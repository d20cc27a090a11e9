"""The answers of an inferred descriptor to what layersmith asks beyond the spec's interface, read from its findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layersmith.block_config import BlockConfig
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.capabilities import LayerFacts
from layersmith.model_descriptor.conventions import KV_HEADS, QUERY_HEADS
from layersmith.model_descriptor.infer.attributes import value_at
from layersmith.model_descriptor.infer.blocks import block_of
from layersmith.model_descriptor.infer.cache import InCache
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.inner_sizes import InnerSize
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.subblocks import LayerKind, Subblock
from layersmith.model_descriptor.stock import language_config, whole_number
from layersmith.modeling_layersmith import as_parent


class InferredCapabilities(ModelDescriptor):
    """Every method is documented where it is declared, in ``Capabilities``."""

    findings: Findings

    @classmethod
    def _kind(cls, index: int) -> LayerKind:
        return cls.findings.kinds[cls.findings.of_layer[index]]

    @classmethod
    def _sizes(cls, index: int) -> Sizes:
        return cls.findings.sizes[cls.findings.of_layer[index]]

    @classmethod
    def _in_cache(cls, index: int) -> InCache:
        return cls.findings.cache[cls.findings.of_layer[index]]

    # ------------------------------------------------------------------------------------------ the whole model

    @classmethod
    def parent_blocks(cls, config: Any) -> list[BlockConfig]:
        findings = cls.for_config(as_parent(config)).findings
        return [block_of(findings, language_config(findings.config), i) for i in range(len(findings.of_layer))]

    @classmethod
    def kinds_of_layers(cls, config: Any) -> list[int]:
        return list(cls.for_config(as_parent(config)).findings.of_layer)

    @classmethod
    def layer_facts(cls, index: int) -> LayerFacts:
        kind, sizes, cached = cls._kind(index), cls._sizes(index), cls._in_cache(index)
        no_ops = [subblock.refuted for subblock in (kind.attention, kind.ffn) if subblock is not None]
        attention, mixer = kind.attention, sizes.mixer
        return LayerFacts(
            refuted=tuple(str(outcome) for outcome in (*no_ops, *sizes.outcomes) if outcome is not None),
            num_query_heads=cls._num_query_heads(index),
            shared_kv_heads=cls._shared_kv_heads(index),
            why_no_query_heads=sizes.no_query_heads,
            why_no_kv_heads=sizes.no_kv_heads,
            heads_end_in_blocks=sizes.head_blocks > 1,
            heads_in_pairs=sizes.head_pairs,
            has_mixer=attention is not None and (mixer is not None or cached.stateful),
            square_state=mixer is not None and mixer.square,
            mixer_problem=cls._mixer_problem(index),
            flat_experts=sizes.flat,
            experts_of_both=sizes.experts_of_both,
            ffn_experts=sizes.ffn_experts,
            attention_stays=attention is not None and attention.stays,
            keeps_state=cached.stateful,
            caches_nothing=cached.empty,
            cache_slots=cached.slots,
            cached_numbers=cached.numbers,
            latent_cache=sum(cached.latent) or None,
            caches_each_query=cached.for_each_query,
            estimates_cache=cached.holds_more,
            inner_sizes={size.name: (size, cls._inner_value(size, index)) for size in sizes.inner},
        )

    @classmethod
    def _inner_value(cls, size: InnerSize, index: int) -> int:
        return value_at(language_config(cls.findings.config), size.path, index) or size.value

    @classmethod
    def _num_query_heads(cls, index: int) -> int | None:
        config, sizes = language_config(cls.findings.config), cls._sizes(index)
        path = sizes.query_heads[0] if sizes.query_heads else sizes.heads_elsewhere
        return whole_number(config, QUERY_HEADS) if path is None else value_at(config, path, index)

    @classmethod
    def _shared_kv_heads(cls, index: int) -> int | None:
        """The number by an attribute of the layer, by one of another kind of layer, or by the usual attribute.

        Only the first is certain; callers prove the others by experiment.
        """
        config, sizes = language_config(cls.findings.config), cls._sizes(index)
        path = sizes.kv_heads or sizes.keys or next((s.kv_heads for s in cls.findings.sizes if s.kv_heads), None)
        if path is not None:
            return value_at(config, path, index) or None
        usual, heads = whole_number(config, KV_HEADS), cls._num_query_heads(index)
        return None if usual and heads and heads % usual else usual  # the usual name may mean something else

    @classmethod
    def _mixer_problem(cls, index: int) -> str:
        if cls.findings.mixers[index] is not None:
            return "its block config does not say the sizes of its mixer"
        mixer = cls._sizes(index).mixer
        return "" if mixer is None else mixer.problem

    # ------------------------------------------------------------------------------------------ modules of a layer

    @classmethod
    def attention_modules(cls, layer: nn.Module) -> tuple[str, ...]:
        attention = cls.findings.kind_of(layer).attention
        return () if attention is None else attention.modules

    @classmethod
    def why_no_linear_layer(cls, layer: nn.Module, subblock: str, module: str) -> str:
        kind = cls.findings.kind_of(layer)
        examined: Subblock | None = getattr(kind, subblock)
        if examined is not None and examined.stays:
            return f"other layers use what the {subblock} computes before its last part"
        # Small matrices next to the module select or scale, as a router does, and are not part of the map.
        sizes = {n: p.numel() for n, p in layer.named_parameters() if p.ndim >= 2 and kind.owners.get(n) == subblock}
        inside = sum(size for name, size in sizes.items() if name.startswith(f"{module}."))
        others = [name for name, size in sizes.items() if not name.startswith(f"{module}.") and 2 * size >= inside]
        return f"the {subblock} also consists of {others[0]}, next to {module}" if others else ""

    @classmethod
    def resized_weights(cls, layer: nn.Module, block: BlockConfig) -> dict[str, list[int | None]]:
        width, moe = block.ffn.intermediate_size, block.ffn.moe
        if not any(sizes.resized or sizes.ffn_experts for sizes in cls.findings.sizes):
            return {}
        sizes = cls.findings.sizes[cls.findings.number_of_kind(layer)]
        lengths = {place: width for place in sizes.resized if width is not None}
        if moe is not None and sizes.ffn_experts is not None:
            lengths |= dict.fromkeys(sizes.ffn_experts.weights, moe.num_local_experts)
        shapes: dict[str, list[int | None]] = {}
        for (name, dim), length in lengths.items():
            shape = layer.get_parameter(name).shape
            if length != shape[dim]:
                shapes[name] = [length if d == dim else None for d in range(len(shape))]
        return shapes

    @classmethod
    def changed_numbers(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int | float]]:
        changed: dict[str, dict[str, int | float]] = {}
        for size, _ in cls._smaller(layer, block):
            for module, attribute, constant in size.constants:
                changed.setdefault(module, {})[attribute] = constant
        moe = block.ffn.moe
        if moe is None or not any(sizes.ffn_experts for sizes in cls.findings.sizes):
            return changed
        experts = cls.findings.sizes[cls.findings.number_of_kind(layer)].ffn_experts
        if experts is None:
            return changed
        for places, value in ((experts.counts, moe.num_local_experts), (experts.uses, moe.num_experts_per_tok)):
            for module, attribute in places:
                if getattr(layer.get_submodule(module), attribute) != value:
                    changed.setdefault(module, {})[attribute] = value
        return changed

    @classmethod
    def shared_entries(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int]]:
        entries: dict[str, dict[str, int]] = {}
        for size, value in cls._smaller(layer, block):
            for shared in size.shared:
                entries.setdefault(shared.module, {})[shared.argument] = value * shared.length // shared.of
        return entries

    @classmethod
    def _smaller(cls, layer: nn.Module, block: BlockConfig) -> list[tuple[InnerSize, int]]:
        """The inner sizes that a block config sets, with their values."""
        inner = block.inner_sizes
        if not inner:
            return []
        sizes = cls.findings.sizes[cls.findings.number_of_kind(layer)].inner
        return [(size, inner[size.name]) for size in sizes if size.name in inner]

    # ------------------------------------------------------------------------------------------ the KV cache

    @classmethod
    def appends_to_cache(cls) -> bool:
        return cls.findings.appends

    @classmethod
    def token_bytes(cls, index: int, dtype: torch.dtype, has_attention: bool) -> int:
        of_layer = cls.findings.of_layer
        is_first = of_layer.index(of_layer[index]) == index
        kept = [kept for kept in cls._in_cache(index).per_token if (is_first if kept.once else has_attention)]
        return sum(kept.numbers * (kept.itemsize or dtype.itemsize) for kept in kept)

    @classmethod
    def state_bytes(
        cls, index: int, block: BlockConfig, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> int:
        heads, kept_heads = cls._num_query_heads(index), block.attention.num_attention_heads
        total = 0
        for state in cls._in_cache(index).states:
            numbers = state.numbers(block.attention.mamba, shapes)
            # In a layer that is all mixer, the config may count the mixer's heads as query heads.
            follows = cls._in_cache(index).stateful and state.of_mixer and block.attention.mamba is None
            if follows and kept_heads and heads and state.shape[0] == heads:
                numbers = numbers * kept_heads // heads
            total += numbers * (state.itemsize or dtype.itemsize)
        return total
