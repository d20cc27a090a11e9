"""Give each decoder layer a config for its index while a model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig, read_block_configs
from layersmith.errors import UnsupportedModel
from layersmith.heterogeneous.plan import (
    cached_modules,
    fills_cache,
    linear_records,
    slots_of_layers,
)
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.modeling_layersmith import (
    heterogeneous_layers,
    make_replacement,
    renumber,
    resize,
    round_cache_of,
    set_cache_slot,
    take_entries,
    with_overrides,
)


def layer_classes(descriptor: type[ModelDescriptor]) -> list[type[nn.Module]]:
    """The decoder layer classes of a descriptor, always as a list."""
    classes = descriptor.decoder_layer_cls()
    return list(classes) if isinstance(classes, list | tuple) else [classes]


@contextmanager
def deci_x_patcher(
    model_descriptor: type[ModelDescriptor],
    block_configs: Sequence[BlockConfig | dict[str, Any]],
    cache_slots_of_layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """While open, layer i of a model that is constructed is built as ``block_configs[i]`` says.

    The layer is built from a copy of the model's config with the descriptor's overrides for its block config. Then the
    descriptor's no-op callbacks run where the block config asks for them. Last the layer gets a slot of the KV cache,
    so that generation is correct when layers have no attention. The config of the model is not changed, and the decoder
    layer classes are restored when the context closes.

    Args:
        model_descriptor: Descriptor of the parent's model family.
        block_configs: The block config of every layer.
        cache_slots_of_layers: The cache slot of every layer, from a plan. Default: computed from the ``layer_types`` of
            the config.

    Raises:
        UnsupportedModel: A block config asks for a no-op that the descriptor does not have.
    """
    blocks = read_block_configs(list(block_configs), "deci_x_patcher")
    present = fills_cache(model_descriptor, blocks)
    slots = list(cache_slots_of_layers or slots_of_layers(model_descriptor, present))

    def configure(config: PretrainedConfig, index: int) -> PretrainedConfig:
        nonlocal slots
        if index >= len(blocks):  # e.g. the layers of a multi-token-prediction head
            return config
        if cache_slots_of_layers is None:
            slots = slots_of_layers(model_descriptor, present, getattr(config, "layer_types", None))
        return with_overrides(config, model_descriptor.block_config_to_layer_overrides(blocks[index]))

    def finish(layer: nn.Module, index: int) -> None:
        if index < len(blocks):
            shapes = model_descriptor.resized_weights(layer, blocks[index])
            numbers = model_descriptor.changed_numbers(layer, blocks[index])
            shared = model_descriptor.shared_entries(layer, blocks[index])
            resize(layer, shapes)
            renumber(layer, numbers)
            take_entries(layer, shared)
            within = cached_modules(model_descriptor, layer, index, slots[index])
            _replace_subblocks(model_descriptor, layer, blocks[index], cache_slots_of_layers is not None)
            set_cache_slot(layer, slots[index], within)
            if name := blocks[index].attention.kv_cache_format:
                round_cache_of(layer, name)

    with heterogeneous_layers(layer_classes(model_descriptor), configure, finish):
        yield


def _replace_subblocks(descriptor: type[ModelDescriptor], layer: nn.Module, block: BlockConfig, planned: bool) -> None:
    # Both records are made before a subblock is replaced, so that the callbacks see the layer as its class builds it.
    linear = {
        name: record
        for subblock in ("attention", "ffn")
        if block.subblock(subblock).replace_with_linear
        for name, record in linear_records(descriptor, layer, subblock, planned).items()
    }
    if block.attention.no_op:
        if not descriptor.attn_no_op_supported():
            raise UnsupportedModel(f"{descriptor.__name__} has no attention no-op (attn_no_op_post_init).")
        descriptor.attn_no_op_post_init(layer)
    if block.ffn.no_op:
        if not descriptor.mlp_no_op_supported():
            raise UnsupportedModel(f"{descriptor.__name__} has no FFN no-op (mlp_no_op_post_init).")
        descriptor.mlp_no_op_post_init(layer)
    for name, record in linear.items():
        # Some families create small weights that ignore the default device, so the largest weight decides.
        reference = max(layer.get_submodule(name).parameters(), key=lambda p: p.ndim)
        replacement = make_replacement(record, reference.dtype)
        layer.set_submodule(name, replacement.to(reference.device))
