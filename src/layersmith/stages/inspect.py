"""What a model is made of, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.costs.budget import Workload
from layersmith.costs.counted import context_note, total
from layersmith.costs.table import CostTable, count_costs
from layersmith.heterogeneous.build import block_configs_of, config_dtype
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative, in_words
from layersmith.library.axes.axis import LayerAxes
from layersmith.library.axes.find import find_axes
from layersmith.library.axes.layers import meta_layers
from layersmith.library.survey import survey_of
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe, read_config
from layersmith.model_descriptor.stock import causal_lm_config, stock_class
from layersmith.modeling_layersmith import without_guard
from layersmith.recipe import BATCH, CONTEXT, LibraryRecipe


@dataclass(frozen=True)
class BlockRow:
    """Neighbouring layers that are alike."""

    layers: str
    attention: str
    attention_alternatives: str
    ffn: str
    ffn_alternatives: str


@dataclass(frozen=True)
class Inspection:
    """What ``layersmith inspect`` shows.

    Attributes:
        blocks: runs of equal layers.
        parts: costs of embeddings and head, of all attentions, of all FFNs, of everything.
        notes: what cannot be changed, and why.
    """

    name: str
    architecture: str
    descriptor: str
    batch: int
    context: int
    blocks: list[BlockRow]
    parts: dict[str, dict[str, int]]
    total: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Outline:
    """A search space found from a config: its axes are not proved on weights yet."""

    descriptor: type[ModelDescriptor]
    blocks: list[BlockConfig]
    alternatives: list[Alternative]
    axes: list[LayerAxes]
    costs: CostTable
    notes: list[str]
    dtype: torch.dtype


def outline(
    parent: str | Path,
    recipe: LibraryRecipe,
    workload: Workload,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    """Find what can be changed in a model, and what everything costs, on the meta device."""
    config = causal_lm_config(without_guard(read_config(parent, trust_remote_code=trust_remote_code)))
    descriptor = descriptor or describe(config)
    blocks = block_configs_of(config, descriptor)
    axes = find_axes(descriptor, config, blocks)
    layers = meta_layers(descriptor, config, blocks)
    found = survey_of(descriptor, blocks, axes, layers, recipe)
    dtype = config_dtype(config)
    costs = count_costs(descriptor, config, blocks, found.alternatives, axes, dtype, workload)
    notes = [*found.notes, *context_note(workload.context, costs.workload)]
    return Outline(descriptor, blocks, found.alternatives, axes, costs, notes, dtype)


def inspect(
    parent: str | Path,
    batch: int = BATCH,
    context: int = CONTEXT,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Describe a model.

    Raises:
        InputError: no config there.
        UnsupportedModel: no descriptor for its family.
    """
    found = outline(parent, LibraryRecipe(), Workload(batch, context), descriptor, trust_remote_code)
    config = causal_lm_config(without_guard(read_config(parent, trust_remote_code=trust_remote_code)))
    blocks = block_configs_of(config, found.descriptor)
    rows = [_row(i, found, block.attention, block.ffn) for i, block in enumerate(blocks)]
    own = {
        s: [found.costs.by_key[a.key] for a in found.alternatives if a.is_parent and a.subblock == s] for s in SUBBLOCKS
    }
    parts = {
        "embeddings, head, final norm": total([found.costs.fixed]),
        "attention": total(own["attention"]),
        "FFN": total(own["ffn"]),
        "all": found.costs.parent,
    }
    return Inspection(
        str(parent),
        f"{stock_class(config).__name__}, {len(blocks)} layers, {str(found.dtype).removeprefix('torch.')}",
        found.descriptor.__name__,
        batch,
        found.costs.workload.context,
        _merged(rows),
        parts,
        found.costs.parent,
        found.notes,
    )


def _row(i: int, found: Outline, attention: AttentionConfig, ffn: FFNConfig) -> tuple[str, str, str, str]:
    cells = []
    subblocks: tuple[tuple[str, AttentionConfig | FFNConfig], ...] = (("attention", attention), ("ffn", ffn))
    for subblock, own in subblocks:
        heads = found.axes[i].kv
        what = in_words(own)
        if subblock == "attention" and heads is not None:
            counts = heads.num_heads * heads.together, heads.size * heads.together
            what = f"{counts[0]} heads, {counts[1]} KV heads of {heads.head_dim}"
        members = [a for a in found.alternatives if a.layer == i and a.subblock == subblock and not a.is_parent]
        sizes: dict[str, list[str]] = {}
        for a in members:
            own_sizes = sizes.setdefault(a.traits.words, [])
            if a.size and str(a.size) not in own_sizes:
                own_sizes.append(str(a.size))
        words = [f"{name} {', '.join(own_sizes)}".strip() for name, own_sizes in sizes.items()]
        cells += [what, "; ".join(words) or "nothing else"]
    return cells[0], cells[1], cells[2], cells[3]


def _merged(rows: list[tuple[str, str, str, str]]) -> list[BlockRow]:
    merged, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[start]:
            merged.append(BlockRow(str(start) if i == start + 1 else f"{start}-{i - 1}", *rows[start]))
            start = i
    return merged
