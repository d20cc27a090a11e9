"""The checkpoint that is exported: its config, the shape of every layer, and its tensors one at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from layersmith.block_config import BlockConfig
from layersmith.errors import UnsupportedModel
from layersmith.heterogeneous.build import block_configs_of
from layersmith.heterogeneous.checkpoint import save
from layersmith.heterogeneous.convert import ordinary_checkpoint
from layersmith.heterogeneous.nested import cut
from layersmith.heterogeneous.quantized import read_gguf_blocks, read_grids
from layersmith.heterogeneous.weight_files import check_files, read_tensor, stored_shapes, weight_map
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe, read_config, read_other_layout
from layersmith.model_descriptor.stock import causal_lm_config, whole_number
from layersmith.modeling_layersmith import as_parent
from layersmith.quantization.formats import Format
from layersmith.quantization.rounding import Grid
from layersmith.run.artifacts import temporary_folder


class CannotExport(UnsupportedModel):
    """The target's layout cannot express the child. The message names the layer, the reason, and what would fit."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: ``queries`` query heads, of which equally many read each of ``kv`` KV heads."""

    queries: int
    kv: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.queries // self.kv


@dataclass(frozen=True)
class Source:
    """A checkpoint to export.

    Attributes:
        folder: Its folder.
        config: Its config, as read.
        parent_config: The stock config without anything that makes layers differ.
        descriptor: Descriptor of the parent's model family.
        blocks: The block config of every layer; sizes that it leaves to the model's config are filled in.
        of_parent: The blocks of a model of ``parent_config``.
        places: The file of every tensor, by its name on the disk.
        compressed: The child's folder if its weights have formats of compressed-tensors; ``folder`` has them unpacked.
    """

    folder: Path
    config: PretrainedConfig
    parent_config: PretrainedConfig
    descriptor: type[ModelDescriptor]
    blocks: tuple[BlockConfig, ...]
    of_parent: tuple[BlockConfig, ...]
    places: dict[str, Path]
    compressed: Path | None = None

    @property
    def language(self) -> Any:
        """The config from which the decoder layers are built."""
        return self.descriptor.get_language_model_config(self.parent_config)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, read from its file."""
        return read_tensor(self.places, name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers' tensors."""
        return self.tensor(next(name for name in self.places if layer_of(name) is not None)).dtype

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return stored_shapes(sorted(set(self.places.values())))

    @cached_property
    def gguf_blocks(self) -> dict[str, tuple[Format, torch.Tensor]]:
        """The weights that the child has in formats of llama.cpp, by their names."""
        return read_gguf_blocks(self.folder)

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The values that weights in formats of compressed-tensors can have, by their names."""
        return {} if self.compressed is None else read_grids(self.compressed)

    def heads(self, i: int) -> Heads | None:
        """The heads of layer ``i``; None if it has no attention with heads."""
        attention, parent = self.blocks[i].attention, self.of_parent[i].attention
        queries = attention.num_attention_heads or parent.num_attention_heads
        queries = queries or whole_number(self.language, "num_attention_heads")
        if attention.no_op or attention.replace_with_linear or attention.mamba is not None or queries is None:
            return None
        return Heads(queries, attention.num_key_value_heads or parent.num_key_value_heads or queries)

    @property
    def parent(self) -> Source:
        """The same files described as if no layer had changed."""
        return replace(self, blocks=self.of_parent)

    @property
    def num_query_heads(self) -> int:
        """The query heads of the parent, where all layers have as many."""
        return int(self.language.num_attention_heads)

    @cached_property
    def windows(self) -> list[int]:
        """The layers whose attention sees only the last ``sliding_window`` tokens."""
        window, most = (getattr(self.language, n, None) for n in ("sliding_window", "max_position_embeddings"))
        if not window or (most and window >= most):
            return []
        kinds = [self.layer_type(i) for i in range(len(self.blocks))]
        return [i for i, kind in enumerate(kinds) if kind in (None, "sliding_attention") and self.heads(i) is not None]

    @property
    def is_alike(self) -> bool:
        """Whether all layers that were alike in the parent are, and none lacks a subblock."""
        pairs = set(zip(self.of_parent, self.blocks, strict=True))
        whole = all(not (part.no_op or part.replace_with_linear) for b in self.blocks for part in (b.attention, b.ffn))
        return whole and len(pairs) == len(set(self.of_parent))

    def layer_type(self, i: int) -> str | None:
        """What the attention of layer ``i`` sees, in the words of the config; None if the config has no such list."""
        types = getattr(self.language, "layer_types", None)
        return self.blocks[i].attention.layer_type or (types[i] if types else None)


def layer_of(name: str) -> int | None:
    """The index of the decoder layer of a tensor; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


@contextmanager
def open_source(child: str | os.PathLike[str] | PreTrainedModel, size: str | float | None = None) -> Iterator[Source]:
    """Open a checkpoint folder, or one of its nested children; a hub id, a GGUF file, or a loaded model.

    A loaded model is saved, and a nested child is cut, for as long as it is open.

    No code of the checkpoint runs.

    Raises:
        InputError: It is missing, damaged, or would need its own code.
        UnsupportedModel: Its family cannot be described.
    """
    if isinstance(child, PreTrainedModel):
        with temporary_folder(Path(tempfile.gettempdir()), "export") as near:
            save(child, near / "child")
            yield _source(near / "child")
    elif size is not None:
        with temporary_folder(Path(tempfile.gettempdir()), "export") as near:
            cut(child, size, near / "child")
            yield _source(near / "child")
    else:
        yield _source(child)


def _source(child: str | os.PathLike[str]) -> Source:
    path = Path(ordinary_checkpoint(child))
    config = causal_lm_config(read_config(child if not path.exists() else path))
    folder = path if path.exists() else Path(snapshot_download(str(child)))
    check_files(folder)
    parent = as_parent(config)
    descriptor = describe(parent)
    of_parent = tuple(descriptor.parent_blocks(parent))
    blocks = tuple(replace(block) for block in block_configs_of(config, descriptor))
    given = Path(child)
    compressed = given if given.is_dir() and read_other_layout(given) is None and given != folder else None
    return Source(folder, config, parent, descriptor, blocks, of_parent, weight_map(folder), compressed)
