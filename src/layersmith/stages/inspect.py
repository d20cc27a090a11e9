"""``inspect``: the blocks of a model, their alternatives and their costs, from the config.

No weights are read, but for a head that may or may not be tied to the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import COST_WORDS, Workload
from layersmith.costs.counted import ModelShape, context_note, total
from layersmith.costs.table import CostTable, count_costs
from layersmith.heterogeneous.build import block_configs_of, config_dtype
from layersmith.heterogeneous.checkpoint import untie_if_stored_apart
from layersmith.heterogeneous.in_memory import Model, checkpoint_of
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.heterogeneous.weight_files import check_files, weight_files
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
from layersmith.tables import Shown, Table
from layersmith.units import format_cost


@dataclass(frozen=True)
class BlockRow:
    """One row of the table of blocks: consecutive layers with the same block and alternatives."""

    layers: str
    attention: str
    attention_alternatives: str
    ffn: str
    ffn_alternatives: str


@dataclass(frozen=True)
class Inspection(Shown):
    """What ``layersmith inspect`` shows.

    Attributes:
        name: Path or hub id of the model.
        architecture: Class of the model, its number of layers and its dtype.
        descriptor: Name of its descriptor.
        batch, context: The workload of the costs; the context is shorter if the model cannot process the one asked for.
        blocks: The blocks, one row for consecutive equal layers.
        parts: Costs of embeddings, head and final norm, of all attentions, of all FFNs, and of the whole model.
        total: Costs of the whole model.
        notes: What cannot be changed, and why.
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

    def tables(self) -> list[Table]:
        """The blocks, and the costs of the parts of the model."""
        headings = ("layers", "attention", "can become", "FFN", "can become")
        blocks = [(b.layers, b.attention, b.attention_alternatives, b.ffn, b.ffn_alternatives) for b in self.blocks]
        names = ("parameters", "weight_bytes", "kv_cache_bytes")
        costs = []
        for label, part in self.parts.items():
            cells = [label]
            for name in names:
                whole = self.total[name]
                cells += [format_cost(name, part[name]), f"{part[name] / whole:.0%}" if whole else ""]
            costs.append(cells)
        labels = [word for name in names for word in (COST_WORDS.get(name, "weight memory"), "")]
        title = f"parameters and memory (batch {self.batch}, context {self.context:,})"
        return [Table("blocks", headings, blocks), Table(title, ("", *labels), costs, True)]


@dataclass(frozen=True)
class Outline:
    """A search space from a config alone; its axes are not proved on weights yet."""

    config: PretrainedConfig
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
    dtype: str = "auto",
) -> Outline:
    """Build the search space of a model with all costs, on the meta device.

    Args:
        parent: Folder or hub id of the parent.
        recipe: Settings of the library, e.g. its sizes.
        workload: Batch and context for the costs.
        descriptor: Descriptor of the parent's model family. Default: from ``describe``.
        trust_remote_code: Let Transformers run code in the folder.
        dtype: Data type in which weights are stored; default: the one in the checkpoint.
    """
    config = causal_lm_config(without_guard(read_config(parent, trust_remote_code=trust_remote_code)))
    if Path(parent).is_dir() and weight_files(Path(parent)):
        check_files(parent)
        untie_if_stored_apart(parent, config)
    descriptor = descriptor or describe(config)
    blocks = block_configs_of(config, descriptor)
    axes = find_axes(descriptor, config, blocks)
    layers = meta_layers(descriptor, config, blocks)
    survey = survey_of(descriptor, blocks, axes, layers, recipe)
    stored = config_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    costs = count_costs(ModelShape(descriptor, config, blocks, axes, stored), survey.alternatives, workload)
    return Outline(
        config=config,
        descriptor=descriptor,
        blocks=blocks,
        alternatives=survey.alternatives,
        axes=axes,
        costs=costs,
        notes=[*survey.notes, *context_note(workload.context, costs.workload)],
        dtype=stored,
    )


def inspect(
    parent: Model,
    batch: int = BATCH,
    context: int = CONTEXT,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """The blocks of a model, the alternatives of each, and where parameters and memory go. No weights are read.

    Args:
        parent: Checkpoint folder or hub id; or a ``PreTrainedModel``, or a pair of one and its tokenizer.
        batch, context: Sequences and tokens of each in the KV cache.
        descriptor: Descriptor of the model family. Default: from ``layersmith.describe``.
        trust_remote_code: Let Transformers run code from the checkpoint.

    Returns:
        A record whose amounts are parameters and bytes; notebooks show it as tables.

    Raises:
        InputError: The parent has no config.
        UnsupportedModel: The model family cannot be described.
    """
    parent = checkpoint_of(parent)
    space = outline(parent, LibraryRecipe(), Workload(batch, context), descriptor, trust_remote_code)
    blocks, costs = space.blocks, space.costs
    by_subblock = {
        s: [costs.by_key[a.key] for a in space.alternatives if a.is_parent and a.subblock == s] for s in SUBBLOCKS
    }
    parts = {
        "embeddings, head, final norm": total([costs.fixed]),
        "attention": total(by_subblock["attention"]),
        "FFN": total(by_subblock["ffn"]),
        "all": costs.parent,
    }
    model_class, dtype = stock_class(space.config).__name__, str(space.dtype).removeprefix("torch.")
    return Inspection(
        name=str(parent),
        architecture=f"{model_class}, {len(blocks)} layers, {dtype}",
        descriptor=space.descriptor.__name__,
        batch=batch,
        context=costs.workload.context,
        blocks=_merged([_row(i, space) for i in range(len(blocks))]),
        parts=parts,
        total=costs.parent,
        notes=space.notes,
    )


def _row(i: int, space: Outline) -> tuple[str, str, str, str]:
    """The cells of a layer in the table of blocks: each subblock and its alternatives in words."""
    cells = []
    for subblock in SUBBLOCKS:
        heads = space.axes[i].kv
        what = in_words(space.blocks[i].subblock(subblock))
        if subblock == "attention" and heads is not None:
            counts = heads.num_heads * heads.together, heads.size * heads.together
            what = f"{counts[0]} heads, {counts[1]} KV heads of {heads.head_dim}"
        members = [a for a in space.alternatives if a.layer == i and a.subblock == subblock and not a.is_parent]
        sizes: dict[str, list[str]] = {}
        for a in members:
            listed = sizes.setdefault(a.traits.words, [])
            if a.size and str(a.size) not in listed:
                listed.append(str(a.size))
        words = [f"{name} {', '.join(listed)}".strip() for name, listed in sizes.items()]
        cells += [what, "; ".join(words) or "nothing else"]
    return cells[0], cells[1], cells[2], cells[3]


def _merged(rows: list[tuple[str, str, str, str]]) -> list[BlockRow]:
    merged, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[start]:
            merged.append(BlockRow(str(start) if i == start + 1 else f"{start}-{i - 1}", *rows[start]))
            start = i
    return merged
