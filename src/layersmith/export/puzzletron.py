"""Targets ``puzzletron`` and ``anymodel``: what NVIDIA's Model-Optimizer and its fork of vLLM read.

* ``puzzletron``: the parent's config with ``block_configs``, and one file per embedding, head and subblock.
* ``anymodel``: the parent's config with ``base_architecture`` and a ``per_layer_config`` of what differs.

Both keep the tensor names of the family. Neither can express query heads or windows that differ
by layer, so missing query heads are filled up with zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.export.grow import Grown, of_query_heads, shapes_of
from layersmith.export.source import CannotExport, Source, layer_of
from layersmith.export.tensors import write_shards
from layersmith.heterogeneous.build import build
from layersmith.heterogeneous.checkpoint import SUBBLOCK_FOLDER
from layersmith.heterogeneous.weight_files import write_files
from layersmith.model_descriptor import any_model
from layersmith.model_descriptor.conventions import ATTENTION
from layersmith.model_descriptor.stock import stock_class
from layersmith.run.artifacts import read_json, write_json

# The fields of a subblock in puzzletron's first schema.
_COMMON = ("no_op", "replace_with_linear", "sparsify", "weights_precision")
_FIELDS = {
    "attention": (*_COMMON, "num_key_value_heads", "llama4", "mamba"),
    "ffn": (*_COMMON, "intermediate_size", "moe"),
}


def prepare(source: Source) -> Callable[[Path], None]:
    """Lay out puzzletron's folder; raises :class:`CannotExport` for query heads or windows that it cannot have."""
    grown = _grown("puzzletron", source)
    entries = [
        {part: {n: block.to_dict()[part].get(n) for n in names} for part, names in _FIELDS.items()}
        | {"parallel_blocks": None}
        for block in grown.blocks
    ]
    return partial(_write_puzzletron, grown, entries)


def _write_puzzletron(grown: Grown, entries: list[dict[str, Any]], folder: Path) -> None:
    _write_config(grown.source, folder, {"block_configs": entries})
    files: dict[str, list[str]] = {}
    for name in grown.shapes:
        files.setdefault(f"{SUBBLOCK_FOLDER}/{_file_of(grown.source, name)}.safetensors", []).append(name)
    write_files(folder, files, grown.tensor)


def _file_of(source: Source, name: str) -> str:
    """The group of a tensor: by the family's patterns, or by the tensor's name where it is renamed on the disk."""
    patterns = source.descriptor.layer_name_predicates(len(source.blocks))
    group = next((group for group, pattern in patterns.items() if pattern.match(name)), None)
    if group is None:
        i, is_attention = layer_of(name), any(part in name for part in ATTENTION)
        group = "lm_head" if i is None else f"block_{i}_{'attention' if is_attention else 'ffn'}"
    return "embeddings" if group == "embedding" else group


def prepare_any_model(source: Source) -> Callable[[Path], None]:
    """Lay out an AnyModel folder; raises :class:`CannotExport` for what ``per_layer_config`` has no place for."""
    grown, entries = _grown("anymodel", source), {}
    for i, block in enumerate(grown.blocks):
        if block.attention.replace_with_linear or block.ffn.replace_with_linear:
            raise CannotExport(
                f"--to anymodel: layer {i} has one linear map in place of a subblock, which per_layer_config cannot "
                "say. Search with --set library.linear=[]."
            )
        if entry := _entry(source, i, block):
            entries[str(i)] = entry
    return partial(_write_any_model, grown, entries)


def _entry(source: Source, i: int, block: BlockConfig) -> dict[str, Any]:
    """What differs from the config in one layer."""
    own, parent = block.to_dict(), source.of_parent[i].to_dict()
    entry: dict[str, Any] = {}
    for path, attribute in any_model.attributes_of(source.descriptor, source.of_parent[i]).items():
        part, *nested = path.split(".")
        value, before = own[part], parent[part]
        for name in nested:
            value, before = (value or {}).get(name), (before or {}).get(name)
        if value is not None and value != before:
            entry[attribute] = value
    skip = [name for name, part in (("attention", "attention"), ("mlp", "ffn")) if own[part]["no_op"]]
    return entry | ({"skip": skip} if skip else {})


def _write_any_model(grown: Grown, entries: dict[str, Any], folder: Path) -> None:
    base = stock_class(grown.source.parent_config).__name__
    more = {"architectures": [any_model.ARCHITECTURE], any_model.BASE: base, any_model.PER_LAYER: entries}
    _write_config(grown.source, folder, more)
    write_shards(folder, grown.shapes, grown.tensor, grown.source.dtype.itemsize)


def _write_config(source: Source, folder: Path, more: dict[str, Any]) -> None:
    config = copy.deepcopy(source.parent_config)
    config.architectures = [stock_class(config).__name__]
    config.save_pretrained(folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | more)


def _grown(target: str, source: Source) -> Grown:
    """The child with as many query heads in all layers."""
    types = getattr(source.language, "layer_types", None)
    for i, block in enumerate(source.blocks):
        if types and block.attention.layer_type not in (None, types[i]):
            raise CannotExport(
                f"--to {target}: layer {i} has {block.attention.layer_type}, the config {types[i]}; the layout cannot "
                "say so. Search with --set library.windows=false."
            )
    queries = source.parent.heads(0)
    heads = of_query_heads(source, source.num_query_heads if queries is None else queries.queries)
    blocks = tuple(
        _with_heads(block, own.kv) if own else block for block, own in zip(source.blocks, heads, strict=True)
    )
    model = build(source.parent_config, blocks, device="meta", descriptor=source.descriptor)
    grown = Grown(source, heads, blocks, shapes_of(source, model))
    try:
        grown.check()
    except (CannotExport, ValueError) as reason:
        raise CannotExport(f"--to {target}: {reason}.") from reason
    return grown


def _with_heads(block: BlockConfig, kv: int) -> BlockConfig:
    has_number = block.attention.num_key_value_heads is not None
    attention = replace(
        block.attention, num_attention_heads=None, num_key_value_heads=kv if has_number else None, layer_type=None
    )
    return replace(block, attention=attention)
