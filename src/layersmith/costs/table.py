"""Costs of every alternative of a search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.costs.counted import Workload, layers_alike, subblock_costs, total
from layersmith.costs.curve import Bend
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor


@dataclass(frozen=True)
class CostTable:
    """Costs by alternative.

    Attributes:
        by_key: key of an alternative to its costs.
        fixed: costs of what is outside the layers.
        parent: costs of the whole parent.
        bend: from the sum of parts to a whole child, where that is more than the sum.
    """

    by_key: dict[str, dict[str, int]]
    fixed: dict[str, int]
    parent: dict[str, int]
    bend: Bend | None = None

    def whole(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Costs of a child from the sums of its parts'."""
        return sums if self.bend is None else self.bend.whole(sums)

    def to_dict(self) -> dict[str, Any]:
        return {"alternatives": self.by_key, "fixed": self.fixed, "parent": self.parent}


def count_costs(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    blocks: Sequence[BlockConfig],
    alternatives: Sequence[Alternative],
    axes: Sequence[LayerAxes],
    dtype: torch.dtype,
    workload: Workload,
) -> CostTable:
    """Count every alternative; one of equal layers is built for it, and as many layers as there are in each model."""
    parent_layers, fixed = subblock_costs(descriptor, config, blocks, dtype, workload, axes)
    kinds = layers_alike(descriptor, config, blocks, parent_layers)
    # For every kind of layer what it can be, and what has that subblock then.
    wanted: dict[int, dict[tuple[str, BlockConfig], list[Alternative]]] = {kind: {} for kind in kinds}
    by_key: dict[str, dict[str, int]] = {}
    for own in alternatives:
        block = own.block_config(blocks[own.layer])
        if block == blocks[own.layer]:
            by_key[own.key] = parent_layers[own.layer][own.subblock]
        else:
            wanted[kinds[own.layer]].setdefault((own.subblock, block), []).append(own)
    waiting = {kind: list(own.items()) for kind, own in wanted.items()}
    while any(waiting.values()):
        changed, counted = list(blocks), {}
        for i, kind in enumerate(kinds):
            if waiting[kind]:
                (subblock, block), members = waiting[kind].pop()
                changed[i], counted[i] = block, (subblock, members)
        layers, _ = subblock_costs(descriptor, config, changed, dtype, workload, axes)
        for i, (subblock, members) in counted.items():
            by_key |= {own.key: layers[i][subblock] for own in members}
    parent = total([*(by_key[a.key] for a in alternatives if a.is_parent), fixed])
    return CostTable({own.key: by_key[own.key] for own in alternatives}, fixed, parent)
