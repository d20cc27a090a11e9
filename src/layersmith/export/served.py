"""Target ``vllm``: the layout in which stock vLLM serves a child, the first of these that can express it.

1. The parent's own layout if all layers are alike, which is an ordinary checkpoint, experts included.
2. The DeciLM layout for Llama-like children.
3. The child's folder with its modelling file, for vLLM's Transformers backend, which serves other families. It needs
   an attention in every layer, as many query heads and equally wide experts in all; zeros fill up what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.export import decilm, padded
from layersmith.export.grow import Grown, of_query_heads, shapes_of
from layersmith.export.proof import Reader, with_layersmith, with_stock_transformers
from layersmith.export.source import CannotExport, Source, layer_of
from layersmith.export.tensors import write_shards
from layersmith.heterogeneous.build import build
from layersmith.modeling_layersmith import finish_folder
from layersmith.run.artifacts import read_json


def prepare(source: Source) -> Callable[[Path], None]:
    """Choose the layout; returns a function that writes it."""
    for name, grid in source.grids.items():
        if "vllm" not in grid.format.servers:
            raise CannotExport(
                f"--to vllm: layer {layer_of(name)}: {name} has the format {grid.format}, which vLLM does not read. "
                "Search with other formats, or export it --to padded, which has weights in bfloat16."
            )
    if source.is_alike:
        return padded.prepare(source)
    try:
        return decilm.prepare(decilm.VLLM, source)
    except CannotExport:
        return _prepare_backend(source)


def read(folder: Path) -> Reader:
    """The reader of whichever layout the folder has."""
    data = read_json(folder / "config.json")
    # Transformers alone does not read all formats of compressed-tensors that vLLM reads.
    is_stock = not (data.get("block_configs") or "layersmith" in data or "quantization_config" in data)
    return with_stock_transformers(folder) if is_stock else with_layersmith(folder)


# ---------------------------------------------------------------------------------------------- Transformers backend


def _prepare_backend(source: Source) -> Callable[[Path], None]:
    _refuse(source)
    heads = of_query_heads(source, source.num_query_heads)
    blocks = []
    for i, (block, parent) in enumerate(zip(source.blocks, source.of_parent, strict=True)):
        # An attention that was removed becomes one of zeros with one KV head, where the family has fewer KV heads.
        kv = own.kv if (own := heads[i]) is not None else parent.attention.num_key_value_heads and 1
        attention = replace(parent.attention, num_key_value_heads=kv, layer_type=block.attention.layer_type)
        blocks.append(BlockConfig(attention, _equally_wide(source, block.ffn)))
    model = build(source.parent_config, blocks, device="meta", descriptor=source.descriptor)
    grown = Grown(source, heads, tuple(blocks), shapes_of(source, model))
    try:
        grown.check()
        _say_kv_heads(source, model.config, blocks)
    except (CannotExport, ValueError) as reason:
        raise CannotExport(f"--to vllm: {reason}.") from reason
    experts = "MoE" if any(block.ffn.moe for block in blocks) else ""
    model.config.architectures = [f"Transformers{experts}ForCausalLM"]  # vLLM's name for its backend
    return partial(_write, model.config, grown)


def _refuse(source: Source) -> None:
    seen: dict[int, int] = {}
    for i, block in enumerate(source.blocks):
        if block.attention.replace_with_linear or block.attention.mamba is not None:
            what, way = "attention is one linear map", """Search with --set 'library.linear=["ffn"]'"""
            if block.attention.mamba is not None:
                what, way = "mixer has a state", "Nothing that layersmith does makes it fit"
            raise CannotExport(
                f"--to vllm: layer {i}: its {what}, and vLLM's Transformers backend needs an attention in every layer. "
                f"{way}."
            )
        if block.ffn.moe is not None:
            seen.setdefault(block.ffn.moe.num_experts_per_tok, i)
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise CannotExport(
            f"--to vllm: layer {second} uses {other} experts per token and layer {first} {one}; vLLM's Transformers "
            "backend reads one number for all layers. Search with --set search.uniform_groups=0."
        )


def _equally_wide(source: Source, ffn: FFNConfig) -> FFNConfig:
    """The FFN with experts as wide as the parent's, as vLLM reads one width."""
    if ffn.moe is None:
        return ffn
    parent = next(b.ffn.moe for b in source.of_parent if b.ffn.moe is not None)
    return replace(ffn, moe=replace(ffn.moe, expert_intermediate_dim=parent.expert_intermediate_dim))


def _say_kv_heads(source: Source, config: PretrainedConfig, blocks: list[BlockConfig]) -> None:
    """Leave of ``per_layer_config`` what vLLM reads by layer; whatever else is there, it cannot read for the model."""
    layers = config.layersmith["per_layer_config"]
    for i, (block, parent) in enumerate(zip(blocks, source.of_parent, strict=True)):
        kv = block.attention.num_key_value_heads
        of_heads = BlockConfig(AttentionConfig(num_key_value_heads=kv))
        names = source.descriptor.block_config_to_layer_overrides(of_heads) if kv else {}
        layers[str(i)] = {name: value for name, value in layers.get(str(i), {}).items() if name in names}
        if kv != parent.attention.num_key_value_heads and not layers[str(i)]:
            raise CannotExport(f"layer {i} has {kv} KV heads, and the config of this family says one number for all")
    config.layersmith["per_layer_config"] = {i: entry for i, entry in layers.items() if entry}


def _write(config: PretrainedConfig, grown: Grown, folder: Path) -> None:
    """The child with layersmith's own modelling file, whatever file came with it."""
    config.save_pretrained(folder)
    finish_folder(folder)
    write_shards(folder, grown.shapes, grown.tensor, grown.source.dtype.itemsize)
    grown.write_formats(folder)
