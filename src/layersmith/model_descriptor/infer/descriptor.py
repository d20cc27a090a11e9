"""The descriptor of any model, made by experiment.

``infer`` builds a small model of a config's family, finds its structure and subblocks by running it, the attributes
that set sizes by building layers that differ in one, and puts what was found behind the interface.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
from layersmith.errors import UnsupportedModel, first_line
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.infer import findings_cache as cache
from layersmith.model_descriptor.infer.attributes import AttributePath, merged, nested, value_at
from layersmith.model_descriptor.infer.cache import (
    InCache,
    KeptState,
    KeptTokens,
    appends_to_cache,
    in_cache,
    numbers_in_full,
)
from layersmith.model_descriptor.infer.experts import OwnExperts
from layersmith.model_descriptor.infer.find_sizes import find_sizes
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.full_size import at_full_length_of, in_config, mixer_of, widths_of
from layersmith.model_descriptor.infer.layers import (
    check_configurable,
    find_structure,
    groups_outside,
    without_attention,
)  # fmt: skip
from layersmith.model_descriptor.infer.mixers import mixer_values
from layersmith.model_descriptor.infer.per_kind_sizes import split, splits_of
from layersmith.model_descriptor.infer.removal import proved, put
from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind, Subblock, find_kind, signature
from layersmith.model_descriptor.patterns import weight_groups
from layersmith.model_descriptor.stock import language_config, own_config, restore_buffers, stock_model, whole_number

_known: dict[str, type[ModelDescriptor]] = {}


def infer(config: PretrainedConfig) -> type[ModelDescriptor]:
    """The descriptor of the model that a config describes; made once, then remembered, on disk too.

    Raises:
        UnsupportedModel: what could not be found out, and why.
    """
    key = cache.key_of(config)
    if key not in _known:
        findings = cache.read(key, Findings)
        if findings is None:
            cache.write(key, findings := find(config))
        _known[key] = descriptor_of(replace(findings, config=own_config(config)), config)
    return _known[key]


def find(config: PretrainedConfig) -> Findings:
    """Run the experiments.

    Raises:
        UnsupportedModel: what could not be found out, and why.
    """
    config = own_config(config)
    try:
        skeleton: nn.Module = stock_model(config)
    except Exception as error:  # whatever a family's own code raises
        raise UnsupportedModel(f"its model cannot be built from this config ({first_line(error)}).") from error
    small = shrunk(config, skeleton)
    specimen, is_whole = Specimen(small), small is config
    structure = find_structure(specimen)
    names = [f"{structure.layers}.{i}" for i in range(structure.num_layers)]
    signatures: list[Any] = []
    kinds: list[LayerKind] = []
    of_layer = []
    for name in names:
        own = signature(specimen.model.get_submodule(name))
        if own not in signatures:
            signatures.append(own)
            kinds.append(find_kind(specimen, name))
        of_layer.append(signatures.index(own))
    if not any(kind.attention for kind in kinds):
        raise UnsupportedModel(without_attention(specimen, structure.layers))
    classes = tuple(dict.fromkeys(type(specimen.model.get_submodule(name)) for name in names))
    notes: list[str] = []
    for k, kind in enumerate(kinds):
        # One of those that a layer of each kind follows, or none.
        after = {own: i for i, own in reversed(list(enumerate(zip(of_layer, [*of_layer[1:], None], strict=True))))}
        kinds[k] = proved(specimen, [names[i] for i in sorted(after.values()) if of_layer[i] == k], kind, notes)
    check_configurable(specimen.config, classes)
    appends = appends_to_cache(specimen, names, [kinds[k] for k in of_layer])
    sizes = find_sizes(specimen, classes, structure.layers, kinds, of_layer)
    splits = splits_of(specimen.config, classes, structure.layers, of_layer, sizes)
    small_kinds, of_layer = of_layer, []
    for layer in skeleton.get_submodule(structure.layers).children():
        if signature(layer) not in signatures:
            raise UnsupportedModel(f"{type(layer).__name__}: its layers are of other kinds once they have run.")
        of_layer.append(signatures.index(signature(layer)))
    if splits:
        small_kinds = split(specimen.config, classes, structure.layers, small_kinds, splits)
        of_layer = split(config, classes, structure.layers, of_layer, splits)
        kinds += [kinds[own.kind] for own in splits]
        signatures += [signatures[own.kind] for own in splits]
        sizes = find_sizes(specimen, classes, structure.layers, kinds, small_kinds)
    examples = [small_kinds.index(k) for k in range(len(kinds))]

    def at_full_length(length: int, k: int) -> int | None:
        small = specimen.model.get_submodule(names[examples[k]])
        large = skeleton.get_submodule(f"{structure.layers}.{of_layer.index(k)}")
        return at_full_length_of(length, kinds[k], small, large)

    def in_full(length: int, k: int) -> int:
        found = at_full_length(length, k) if k in of_layer else None
        return in_config(length, specimen.config, config) if found is None else found

    for k, own_sizes in enumerate(sizes):
        if own_sizes.head_size is not None and k in of_layer:
            path, size = own_sizes.head_size
            small_heads, heads = (
                value_at(language_config(c), own_sizes.query_heads[0]) for c in (specimen.config, config)
            )
            length = at_full_length(small_heads * size, k)
            sizes[k] = (
                replace(own_sizes, query_heads=(), head_size=None)
                if length is None
                else replace(own_sizes, head_size=(path, length // heads))
            )
    large = skeleton.get_submodule(structure.layers)
    widths = [widths_of(sizes[k], config, large.get_submodule(str(i))) for i, k in enumerate(of_layer)]
    seen_in_cache = in_cache(specimen, names, small_kinds, kinds, sizes)

    def latent_of(own: InCache, k: int) -> int | None:
        if not own.latent or k not in of_layer or is_whole:
            return sum(own.latent) or None
        whole = at_full_length(sum(own.latent), k)
        return sum(in_full(length, k) for length in own.latent) if whole is None else whole

    def beside_of(own: InCache, k: int) -> tuple[KeptTokens, ...]:
        if k not in of_layer or is_whole:
            return own.beside
        found = [at_full_length(kept.numbers, k) for kept in own.beside]
        return tuple(
            numbers_in_full(kept, place, examples[k] * own.slots, specimen, config)
            if length is None
            else replace(kept, numbers=length)
            for place, (kept, length) in enumerate(zip(own.beside, found, strict=True))
        )

    groups = groups_outside(skeleton, structure)
    remote = not type(specimen.model).__module__.startswith("transformers.")
    return Findings(
        structure,
        classes,
        tuple(signatures),
        tuple(kinds),
        tuple(sizes),
        tuple(of_layer),
        groups,
        remote,
        tuple(notes),
        tuple(widths),
        tuple(own.stateful for own in seen_in_cache),
        tuple(own.numbers for own in seen_in_cache),
        tuple(latent_of(own, k) for k, own in enumerate(seen_in_cache)),
        tuple(own.empty for own in seen_in_cache),
        tuple(
            tuple(replace(s, shape=tuple(in_full(d, k) for d in s.shape)) for s in own.states)
            for k, own in enumerate(seen_in_cache)
        ),
        tuple(
            mixer_of(sizes[k], config, i, skeleton.get_submodule(f"{structure.layers}.{i}"))
            for i, k in enumerate(of_layer)
        ),
        appends,
        tuple(own.slots for own in seen_in_cache),
        tuple(beside_of(own, k) for k, own in enumerate(seen_in_cache)),
        tuple(own.for_each_query for own in seen_in_cache),
        tuple(own.more for own in seen_in_cache),
        config,
    )


# ---------------------------------------------------------------------------------------------- the descriptor


class InferredDescriptor(ModelDescriptor):
    """The interface over findings; every model gets a subclass with its own."""

    findings: Findings

    @classmethod
    def _no_op(cls, decoder_layer: nn.Module, subblock: str) -> None:
        kind = cls.findings.kind_of(decoder_layer)
        own: Subblock | None = getattr(kind, subblock)
        if own is None:
            return  # this kind of layer has none: it does nothing already
        if not own.removable:
            raise UnsupportedModel(f"{type(decoder_layer).__name__} has no {subblock} no-op: {own.reason}.")
        for name, record in own.replaced:
            put(decoder_layer, name, record)
        others = [n for s in (kind.attention, kind.ffn) if s is not None and s is not own for n in s.modules]
        if others and not any(list(decoder_layer.get_submodule(name).parameters()) for name in others):
            for name, record in kind.shared:
                put(decoder_layer, name, record)

    @classmethod
    def attention_stays(cls, index: int) -> bool:
        """Whether the attention of a layer still writes to the KV cache when its no-op has been made."""
        attention = cls.findings.kinds[cls.findings.of_layer[index]].attention
        return attention is not None and attention.stays

    @classmethod
    def attention_modules(cls, layer: nn.Module) -> tuple[str, ...]:
        """The modules of a layer, as its class builds it, that do the work of its attention."""
        attention = cls.findings.kind_of(layer).attention
        return () if attention is None else attention.modules

    @classmethod
    def why_not_whole(cls, layer: nn.Module, subblock: str, module: str) -> str:
        """Why a module of a layer does not do the whole work of a subblock; empty if it does."""
        kind = cls.findings.kind_of(layer)
        own: Subblock | None = getattr(kind, subblock)
        if own is not None and own.stays:
            return f"other layers use what the {subblock} makes before its last part"
        # What is small beside it chooses or scales, as a router does, and says nothing of what goes in.
        sizes = {n: p.numel() for n, p in layer.named_parameters() if p.ndim >= 2 and kind.owners.get(n) == subblock}
        inside = sum(size for name, size in sizes.items() if name.startswith(f"{module}."))
        before = [name for name, size in sizes.items() if not name.startswith(f"{module}.") and 2 * size >= inside]
        return f"the {subblock} is made of {before[0]} too, beside {module}" if before else ""

    @classmethod
    def resized_weights(cls, layer: nn.Module, block: BlockConfig) -> dict[str, list[int | None]]:
        """Weights of a freshly built layer that get another shape, for a width that no attribute says, or for experts.

        Where the attention has experts too, and one attribute says the number of either, the FFN's are resized. None is
        a length that stays as the layer's config makes it.
        """
        width, moe = block.ffn.intermediate_size, block.ffn.moe
        if not any(own.resized or own.own_experts for own in cls.findings.sizes):
            return {}
        sizes = cls.findings.sizes[cls.findings.number_of_kind(layer)]
        lengths = {(name, dim): width for name, dim in sizes.resized if width is not None}
        if moe is not None and sizes.own_experts is not None:
            for name, dim in sizes.own_experts.weights:
                lengths[name, dim] = moe.num_local_experts
        shapes: dict[str, list[int | None]] = {}
        for (name, dim), length in lengths.items():
            shape = layer.get_parameter(name).shape
            if length != shape[dim]:
                shapes[name] = [length if d == dim else None for d in range(len(shape))]
        return shapes

    @classmethod
    def own_numbers(cls, layer: nn.Module, block: BlockConfig) -> dict[str, dict[str, int]]:
        """Plain numbers of modules of a freshly built layer that are others, where the config has its attention's."""
        moe = block.ffn.moe
        if moe is None or not any(own.own_experts for own in cls.findings.sizes):
            return {}
        own = cls.findings.sizes[cls.findings.number_of_kind(layer)].own_experts
        found: dict[str, dict[str, int]] = {}
        for places, value in ((own.counts, moe.num_local_experts), (own.uses, moe.num_experts_per_tok)) if own else ():
            for module, attribute in places:
                if getattr(layer.get_submodule(module), attribute) != value:
                    found.setdefault(module, {})[attribute] = value
        return found

    @classmethod
    def flat_experts(cls, index: int) -> tuple[str, ...]:
        """Weights of a layer in which experts lie one after another along the first dimension."""
        return cls.findings.sizes[cls.findings.of_layer[index]].flat

    @classmethod
    def experts_of_both(cls, index: int) -> bool:
        """Whether the number of a layer's experts, and of those that a token uses, is that of its attention's too."""
        return cls.findings.sizes[cls.findings.of_layer[index]].experts_of_both

    @classmethod
    def own_experts(cls, index: int) -> OwnExperts | None:
        """What the number of experts is in a layer's FFN, where it is its attention's too; None if it is not known."""
        return cls.findings.sizes[cls.findings.of_layer[index]].own_experts

    @classmethod
    def keeps_state(cls, index: int) -> bool:
        """Whether the mixer of a layer has a state in the cache that does not grow with the tokens."""
        findings = cls.findings
        return bool(findings.stateful) and findings.stateful[findings.of_layer[index]]

    @classmethod
    def caches_nothing(cls, index: int) -> bool:
        """Whether a layer keeps nothing in the cache."""
        findings = cls.findings
        return bool(findings.empty) and findings.empty[findings.of_layer[index]]

    @classmethod
    def estimates_cache(cls, index: int) -> bool:
        """Whether what a layer keeps in the cache is only estimated, because it keeps it in a way of its own."""
        findings = cls.findings
        return bool(findings.more_in_cache) and findings.more_in_cache[findings.of_layer[index]]

    @classmethod
    def state_bytes(
        cls, index: int, block: BlockConfig, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> int:
        """Bytes a sequence that a layer keeps in the cache whatever the number of tokens.

        Args:
            index: of the layer.
            block: what it is.
            shapes: of its weights.
            dtype: of the model.
        """
        findings = cls.findings
        kept = findings.states[findings.of_layer[index]] if findings.states else ()
        heads, own = cls.num_query_heads(index), block.attention.num_attention_heads

        def numbers(state: KeptState) -> int:
            count = state.numbers(block.attention.mamba, shapes)
            # Where there is nothing but a mixer, its heads may be what the config counts as query heads.
            follows = cls.keeps_state(index) and state.of_mixer and block.attention.mamba is None
            return count * own // heads if follows and own and heads and state.shape[0] == heads else count

        return sum(numbers(s) * (s.itemsize or dtype.itemsize) for s in kept)

    @classmethod
    def has_mixer(cls, index: int) -> bool:
        """Whether a layer has a mixer that keeps a state of fixed size, with or without keys and values beside it."""
        findings = cls.findings
        k = findings.of_layer[index]
        return findings.kinds[k].attention is not None and (
            findings.sizes[k].mixer is not None or cls.keeps_state(index)
        )

    @classmethod
    def square_state(cls, index: int) -> bool:
        """Whether the state of a layer's mixer is as large as a head because both are one attribute."""
        mixer = cls.findings.sizes[cls.findings.of_layer[index]].mixer
        return mixer is not None and mixer.square

    @classmethod
    def mixer_problem(cls, index: int) -> str:
        """Why the sizes of a layer's mixer cannot differ, as far as that was seen; empty if it was not."""
        if cls.findings.mixers and cls.findings.mixers[index] is not None:
            return "its block config does not say the sizes of its mixer"
        mixer = cls.findings.sizes[cls.findings.of_layer[index]].mixer
        return mixer.problem if mixer is not None else ""

    @classmethod
    def appends_to_cache(cls) -> bool:
        """Whether layers append to the cache in turn, so that those after one that does not have to move up."""
        return cls.findings.appends

    @classmethod
    def cached_numbers(cls, index: int) -> float:
        """Numbers in the KV cache for each one of a value head; keys may be longer or shorter than values."""
        findings = cls.findings
        return findings.cached[findings.of_layer[index]] if findings.cached else 2.0

    @classmethod
    def latent_cache(cls, index: int) -> int | None:
        """Numbers in the KV cache for a token that all heads of a layer share; None if each KV head has its own."""
        findings = cls.findings
        return findings.latent[findings.of_layer[index]] if findings.latent else None

    @classmethod
    def caches_each_query(cls, index: int) -> bool:
        """Whether the KV cache holds keys and values for each query head, however many KV heads there are."""
        findings = cls.findings
        return bool(findings.for_each_query) and findings.for_each_query[findings.of_layer[index]]

    @classmethod
    def cache_slots(cls, index: int) -> int:
        """The slots of the KV cache that a layer has, one for each of its attentions."""
        findings = cls.findings
        return findings.slots[findings.of_layer[index]] if findings.slots else 1

    @classmethod
    def token_bytes(cls, index: int, dtype: torch.dtype, has_attention: bool) -> int:
        """Bytes that a slot of a layer keeps of every token beside keys and values, e.g. the keys of an indexer."""
        findings = cls.findings
        k = findings.of_layer[index]
        kept = findings.beside[k] if findings.beside else ()
        is_first = findings.of_layer.index(k) == index
        own = [kept for kept in kept if (is_first if kept.once else has_attention)]
        return sum(kept.numbers * (kept.itemsize or dtype.itemsize) for kept in own)

    @classmethod
    def of(cls, config: PretrainedConfig) -> type[InferredDescriptor]:
        """This descriptor for the config that it was made from; for another of the family one made from that."""
        own = cls.findings.config
        if own is None or cache.key_of(own) == cache.key_of(config):
            return cls
        found = infer(config)
        assert issubclass(found, InferredDescriptor)
        return found

    @classmethod
    def num_query_heads(cls, index: int) -> int | None:
        """H of a layer, if it is a number that can differ by layer or that its config names as usual."""
        findings = cls.findings
        config = cls.get_language_model_config(findings.config)
        sizes = findings.sizes[findings.of_layer[index]]
        path = sizes.query_heads[0] if sizes.query_heads else sizes.heads_elsewhere
        if path is not None:
            return value_at(config, path, index)
        return whole_number(config, "num_attention_heads")

    @classmethod
    def shared_kv_heads(cls, index: int) -> int | None:
        """K of a layer in which that cannot differ alone, e.g. because other layers use its keys and values.

        Where no attribute is seen to set a layer's own, it is what sets those of the others, or what a config calls so
        as usual; that is to be tried.
        """
        findings = cls.findings
        config = cls.get_language_model_config(findings.config)
        own, *others = [findings.sizes[findings.of_layer[index]], *findings.sizes]
        path = own.kv_heads or own.keys or next((sizes.kv_heads for sizes in others if sizes.kv_heads), None)
        if path is not None:
            return value_at(config, path, index) or None
        usual, heads = whole_number(config, "num_key_value_heads"), cls.num_query_heads(index)
        return None if usual and heads and heads % usual else usual  # what is called so may be something else

    @classmethod
    def why_no_query_heads(cls, index: int) -> str:
        """Why a layer's number of query heads cannot differ alone; empty where that was not seen."""
        return cls.findings.sizes[cls.findings.of_layer[index]].no_query_heads

    @classmethod
    def why_no_kv_heads(cls, index: int) -> str:
        """The same of KV heads."""
        return cls.findings.sizes[cls.findings.of_layer[index]].no_kv_heads

    @classmethod
    def heads_end_in_blocks(cls, index: int) -> bool:
        """Whether the projection that heads end in is made of blocks, each of which reads its share of the heads."""
        return cls.findings.sizes[cls.findings.of_layer[index]].head_blocks > 1

    @classmethod
    def heads_in_pairs(cls, index: int) -> bool:
        """Whether a head of either half of all work together, and end next to each other."""
        return cls.findings.sizes[cls.findings.of_layer[index]].head_pairs

    @classmethod
    def parent_blocks(cls) -> list[BlockConfig]:
        """The block config of every layer of the config that was described."""
        config = cls.findings.config
        assert config is not None
        language = cls.get_language_model_config(config)
        return [_block(cls.findings, language, i) for i in range(len(cls.findings.of_layer))]


def _block(findings: Findings, config: PretrainedConfig, index: int) -> BlockConfig:
    kind, sizes = findings.kinds[findings.of_layer[index]], findings.sizes[findings.of_layer[index]]

    def number(path: AttributePath | None) -> int | None:
        return value_at(config, path, index) or None if path is not None else None

    attention = AttentionConfig(no_op=True)
    if kind.attention is not None:
        # Keys and values that later layers use are of a size that those layers are built for.
        mixer = findings.mixers[index] if findings.mixers else None
        attention = AttentionConfig(
            num_key_value_heads=None if kind.attention.stays else number(sizes.kv_heads),
            mamba=None if mixer is None else MambaConfig(**mixer),
        )
    ffn = FFNConfig(no_op=True)
    width, shared = findings.widths[index]
    if kind.ffn is not None and sizes.num_experts is None:
        ffn = FFNConfig(intermediate_size=width)
    elif kind.ffn is not None:
        known = [s.experts_per_token for s in findings.sizes if s.experts_per_token]
        per_token = sizes.experts_per_token or (known[0] if known else None)
        moe = MoEConfig(
            number(sizes.num_experts) or 1,
            number(per_token) or 1,
            width,
            # What goes with the width of the experts is no size of its own.
            shared if sizes.shared_width != sizes.expert_width else None,
        )
        ffn = FFNConfig(moe=moe)
    return BlockConfig(attention, ffn)


def descriptor_of(findings: Findings, config: PretrainedConfig) -> type[ModelDescriptor]:
    """A descriptor class over findings."""
    structure, kinds = findings.structure, findings.kinds

    def overrides(block_config: BlockConfig) -> dict[str, Any]:
        found: dict[str, Any] = {}
        language = Described.get_language_model_config(findings.config)
        moe = block_config.ffn.moe
        types = getattr(language, "layer_types", None)
        if block_config.attention.layer_type is not None and types:
            found["layer_types"] = [block_config.attention.layer_type] * len(types)
        for sizes in findings.sizes:
            unit = sizes.config_width
            attention = block_config.attention
            values: list[tuple[AttributePath | None, int | None, int]] = [
                (sizes.kv_heads, attention.num_key_value_heads, 1)
            ]
            if attention.num_attention_heads is not None:
                values += [(path, attention.num_attention_heads, 1) for path in sizes.query_heads]
                if sizes.head_size is not None and sizes.query_heads:
                    values.append((*sizes.head_size, 1))
            if moe is None and sizes.num_experts is None:
                values.append((sizes.width, block_config.ffn.intermediate_size, unit))
            elif moe is not None and sizes.num_experts is not None:
                values += [
                    (sizes.num_experts, moe.num_local_experts, 1),
                    (sizes.experts_per_token, moe.num_experts_per_tok, 1),
                    (sizes.shared_width, moe.shared_expert_intermediate_dim, unit),
                    (sizes.expert_width, moe.expert_intermediate_dim, unit),
                ]
            for path, value, factor in values:
                if sizes.experts_of_both and path in (sizes.num_experts, sizes.experts_per_token):
                    continue  # the attention's would change with it
                if path is not None and value is not None:
                    found = merged(found, nested(language, path, value * factor))
            for path, size in mixer_values(sizes.mixer, attention.mamba, partial(value_at, language)):
                found = merged(found, nested(language, path, size))
        return found

    def init_rotary(model: nn.Module, runtime: Any) -> None:
        restore_buffers(model, runtime)

    class Described(InferredDescriptor):
        @staticmethod
        def decoder_layer_cls() -> Any:
            return findings.classes[0] if len(findings.classes) == 1 else list(findings.classes)

        @staticmethod
        def block_config_to_layer_overrides(block_config: BlockConfig) -> dict[str, Any]:
            return overrides(block_config)

        @staticmethod
        def input_embedding_name() -> str:
            return structure.embedding

        @staticmethod
        def output_embedding_name() -> str:
            return structure.head

        @staticmethod
        def final_norm_name() -> str:
            return structure.final_norm

        @staticmethod
        def layer_block_name(index: int) -> str:
            return f"{structure.layers}.{index}"

        @staticmethod
        def layer_name_predicates(num_layers: int) -> dict[str, re.Pattern[str]]:
            kinds_of_layers = [findings.kinds[k] for k in findings.of_layer]
            return weight_groups(structure.layers, findings.groups, kinds_of_layers, num_layers)

        @staticmethod
        def init_rotary_embedding(model: nn.Module, runtime: Any) -> None:
            init_rotary(model, runtime)

        @staticmethod
        def get_language_model_config(config: Any) -> Any:
            return language_config(config)

        @staticmethod
        def requires_trust_remote_code() -> bool:
            return findings.remote_code

    Described.findings = findings
    for name, callback in (("attention", "attn_no_op_post_init"), ("ffn", "mlp_no_op_post_init")):
        own = [getattr(kind, name) for kind in kinds]
        # Where no layer has such a subblock, it is gone already.
        if any(s is not None and s.removable for s in own) or not any(own):

            def post_init(decoder_layer: nn.Module, subblock: str = name) -> None:
                Described._no_op(decoder_layer, subblock)

            setattr(Described, callback, staticmethod(post_init))
    family = re.sub(r"[^0-9A-Za-z]+", " ", str(getattr(config, "model_type", "") or type(config).__name__)).title()
    Described.__name__ = Described.__qualname__ = family.replace(" ", "") + "Inferred"
    return Described
