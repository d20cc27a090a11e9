"""Target ``vllm``: the layout in which stock vLLM serves a child, the first of these that can express it.

1. The parent's own layout if all layers are alike, which is an ordinary checkpoint, experts included.
2. The DeciLM layout for Llama-like children.
3. The child's folder with its modelling file, for vLLM's Transformers backend, which serves any family. Attentions are
   numbered by their slot in the KV cache, so that removed ones leave no gap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from layersmith.block_config import has_attention
from layersmith.export import decilm, padded
from layersmith.export.proof import Reader, with_layersmith, with_stock_transformers
from layersmith.export.source import CannotExport, Source
from layersmith.export.tensors import write_shards
from layersmith.heterogeneous.build import child_config
from layersmith.modeling_layersmith import AUTO_MAP, finish_folder
from layersmith.run.artifacts import read_json


def prepare(source: Source) -> Callable[[Path], None]:
    """Choose the layout; returns a function that writes it."""
    if source.is_alike:
        return padded.prepare(source)
    try:
        return decilm.prepare(decilm.VLLM, source)
    except CannotExport:
        return partial(_write, source)


def read(folder: Path) -> Reader:
    """The reader of whichever layout the folder has."""
    data = read_json(folder / "config.json")
    is_stock = not data.get("block_configs") and "layersmith" not in data
    return with_stock_transformers(folder) if is_stock else with_layersmith(folder)


def _write(source: Source, folder: Path) -> None:
    """The child as it is, with layersmith's own modelling file, whatever file came with it."""
    config = copy.deepcopy(source.config)
    if not hasattr(config, "layersmith"):
        config = child_config(config, source.blocks, source.descriptor)
    present = [has_attention(block) for block in source.blocks]
    types = {source.layer_type(i) for i, has in enumerate(present) if has}
    if len(types) == 1:
        for i, record in enumerate(config.layersmith["layers"]):
            record["cache_slot"] = sum(present[:i])
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(folder)
    finish_folder(folder)
    write_shards(folder, source.shapes, source.tensor, source.dtype.itemsize)
