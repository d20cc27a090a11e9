"""Give each decoder layer its own config while a model is built."""

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
    make_replacement,
    own_layers,
    renumber,
    resize,
    set_cache_slot,
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

    The layer gets a copy of the model's config with the descriptor's overrides for its block config, then the
    descriptor's no-op callbacks where the block config asks for them, and a slot of the KV cache that keeps
    generation right when layers have no attention. The config that the model was given is not changed, and the
    decoder layer classes are as before when the context closes.

    Args:
        model_descriptor: of the family.
        block_configs: one a layer.
        cache_slots_of_layers: the slot of every layer, as a plan has them; default: from the ``layer_types`` of the
            config.

    Raises:
        UnsupportedModel: a block config asks for a no-op that the descriptor does not have.
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
            resize(layer, shapes)
            renumber(layer, numbers)
            within = cached_modules(model_descriptor, layer, index, slots[index])
            _replace_subblocks(model_descriptor, layer, blocks[index], cache_slots_of_layers is not None)
            set_cache_slot(layer, slots[index], within)

    with own_layers(layer_classes(model_descriptor), configure, finish):
        yield


def _replace_subblocks(descriptor: type[ModelDescriptor], layer: nn.Module, block: BlockConfig, planned: bool) -> None:
    # Both records are taken before either subblock is touched: the callbacks see the layer as it was built.
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
        # A family may make a small weight in a way that takes no notice of the device that all are to lie on.
        reference = max(layer.get_submodule(name).parameters(), key=lambda p: p.ndim)
        replacement = make_replacement(record, reference.dtype)
        layer.set_submodule(name, replacement.to(reference.device))
