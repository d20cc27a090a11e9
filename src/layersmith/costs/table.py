"""Costs of every alternative of a search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.counted import layers_alike, max_positions, subblock_costs, total
from layersmith.costs.curve import Bend
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor


@dataclass(frozen=True)
class CostTable:
    """Costs by alternative.

    Attributes:
        by_key: Key of an alternative to its costs.
        fixed: Costs of what is outside the layers.
        parent: Costs of the whole parent.
        bend: Correction from the sum of parts to the time of a whole child, if children were timed.
        workload: Workload that the costs are for; no longer than the model's positions.
    """

    by_key: dict[str, dict[str, int]]
    fixed: dict[str, int]
    parent: dict[str, int]
    bend: Bend | None = None
    workload: Workload = field(default_factory=Workload)

    def whole(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Costs of a child from the sums of its parts."""
        return sums if self.bend is None else self.bend.whole(sums)

    def to_dict(self) -> dict[str, Any]:
        """The counted costs as JSON data, without a correction."""
        counted = {"alternatives": self.by_key, "fixed": self.fixed, "parent": self.parent}
        return counted | {"workload": asdict(self.workload)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CostTable:
        return CostTable(
            by_key=data["alternatives"],
            fixed=data["fixed"],
            parent=data["parent"],
            workload=Workload(**data["workload"]),
        )


def count_costs(
    descriptor: type[ModelDescriptor],
    config: PretrainedConfig,
    blocks: Sequence[BlockConfig],
    alternatives: Sequence[Alternative],
    axes: Sequence[LayerAxes],
    dtype: torch.dtype,
    workload: Workload,
) -> CostTable:
    """Count the costs of every alternative.

    Alternatives are counted on models built on the meta device. Each model has a different alternative in every layer,
    and of equal layers only one is built, so few models are needed.

    Args:
        descriptor: Descriptor of the parent's model family.
        config: Config of the parent.
        blocks: Block configs of the parent, one a layer.
        alternatives: All alternatives of the search space.
        axes: Axes of the parent's layers.
        dtype: Data type of the weights and the KV cache.
        workload: Workload to count for. A context beyond the model's positions is capped to them, since the model
            cannot fill it; the table's ``workload`` is the capped one.
    """
    workload = workload.within(max_positions(descriptor.get_language_model_config(config)))
    parent_layers, fixed = subblock_costs(descriptor, config, blocks, dtype, workload, axes)
    kinds = layers_alike(descriptor, config, blocks, parent_layers)
    by_key = {a.key: parent_layers[a.layer][a.subblock] for a in alternatives}
    # For every kind of layer the blocks that it can become, each with the alternatives that make it so.
    waiting: dict[int, dict[tuple[str, BlockConfig], list[Alternative]]] = {kind: {} for kind in kinds}
    for a in alternatives:
        block = a.block_config(blocks[a.layer])
        if block != blocks[a.layer]:
            waiting[kinds[a.layer]].setdefault((a.subblock, block), []).append(a)
    while any(waiting.values()):
        changed, counted = list(blocks), {}
        for i, kind in enumerate(kinds):
            if waiting[kind]:
                (subblock, block), members = waiting[kind].popitem()
                changed[i], counted[i] = block, (subblock, members)
        layers, _ = subblock_costs(descriptor, config, changed, dtype, workload, axes)
        for i, (subblock, members) in counted.items():
            by_key |= {a.key: layers[i][subblock] for a in members}
    parent = total([*(by_key[a.key] for a in alternatives if a.is_parent), fixed])
    return CostTable(by_key, fixed, parent, workload=workload)
