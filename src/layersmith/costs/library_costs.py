"""Costs of every alternative of a search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith.block_config import BlockConfig
from layersmith.costs.counted import Workload, subblock_costs, total
from layersmith.library.alternative import Alternative
from layersmith.library.axes import LayerAxes
from layersmith.model_descriptor.base import ModelDescriptor


@dataclass(frozen=True)
class CostTable:
    """Costs by alternative.

    Attributes:
        by_key: key of an alternative to its costs.
        fixed: costs of what is outside the layers.
        parent: costs of the whole parent.
    """

    by_key: dict[str, dict[str, int]]
    fixed: dict[str, int]
    parent: dict[str, int]

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
    """Count every alternative, one build on the meta device for each kind and size rather than for each layer."""
    by_variant: dict[tuple[str, str, int], list[Alternative]] = {}
    for alternative in alternatives:
        by_variant.setdefault((alternative.subblock, alternative.kind, alternative.size), []).append(alternative)
    by_key: dict[str, dict[str, int]] = {}
    fixed: dict[str, int] = {}
    for members in by_variant.values():
        changed = list(blocks)
        for alternative in members:
            changed[alternative.layer] = alternative.block_config(blocks[alternative.layer])
        layers, fixed = subblock_costs(descriptor, config, changed, dtype, workload, axes)
        for alternative in members:
            by_key[alternative.key] = layers[alternative.layer][alternative.subblock]
    parent = total([*(by_key[a.key] for a in alternatives if a.kind == "parent"), fixed])
    return CostTable(by_key, fixed, parent)
