"""Costs of every alternative of a search space."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired

from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Workload
from layersmith.costs.counted import ModelShape, layers_alike, max_positions, outside_costs, subblock_costs, total
from layersmith.costs.curve import Bend
from layersmith.library.alternative import Alternative
from layersmith.library.formats import in_formats
from layersmith.records import check, parse


class _Costs(TypedDict):
    parameters: NonNegativeInt
    active_parameters: NonNegativeInt
    weight_bytes: NonNegativeInt
    kv_cache_bytes: NonNegativeInt
    memory_bytes: NonNegativeInt


class _Counted(TypedDict):
    """A table's JSON data."""

    alternatives: dict[str, _Costs]
    fixed: _Costs
    parent: _Costs
    workload: dict[str, Any]
    outside: NotRequired[dict[str, _Costs]]


@dataclass(frozen=True)
class CostTable:
    """Costs by alternative.

    Attributes:
        by_key: Key of an alternative to its costs.
        fixed: Costs of what is outside the layers.
        parent: Costs of the whole parent.
        bend: Correction from the sum of parts to the time of a whole child, if children were timed.
        workload: Workload that the costs are for; no longer than the model's positions.
        outside: Number format of embeddings and head to the costs of what is outside the layers; none without formats.
    """

    by_key: dict[str, dict[str, int]]
    fixed: dict[str, int]
    parent: dict[str, int]
    bend: Bend | None = None
    workload: Workload = field(default_factory=Workload)
    outside: dict[str, dict[str, int]] = field(default_factory=dict)

    def whole(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Costs of a child from the sums of its parts."""
        return sums if self.bend is None else self.bend.whole(sums)

    def to_dict(self) -> dict[str, Any]:
        """The counted costs as JSON data, without a correction."""
        counted = {"alternatives": self.by_key, "fixed": self.fixed, "parent": self.parent}
        counted |= {"outside": self.outside} if self.outside else {}
        return counted | {"workload": asdict(self.workload)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CostTable:
        check(data, _Counted, "costs")
        return CostTable(
            by_key=data["alternatives"],
            fixed=data["fixed"],
            parent=data["parent"],
            workload=parse(Workload, data["workload"], "workload: "),
            outside=data.get("outside", {}),
        )


def count_costs(
    parent: ModelShape,
    alternatives: Sequence[Alternative],
    workload: Workload,
    formats: Sequence[str] = (),
    kv_formats: Sequence[str] = (),
) -> CostTable:
    """Count the costs of every alternative.

    Alternatives are counted on models built on the meta device. Each model has a different alternative in every layer,
    and of equal layers only one is built, so few models are needed.

    Args:
        parent: Shape of the parent.
        alternatives: All alternatives of the search space.
        workload: Workload to count for. A context beyond the model's positions is capped to them, since the model
            cannot fill it; the table's ``workload`` is the capped one.
        formats: Number formats in which alternatives are counted as well.
        kv_formats: The same for the KV cache.
    """
    blocks, more = parent.blocks, (formats, kv_formats)
    workload = workload.within(max_positions(parent.language))
    parent_layers, fixed = subblock_costs(parent, workload, *more)
    kinds = layers_alike(parent.descriptor, parent.config, blocks, parent_layers)
    by_key = _in_all_formats(alternatives, parent_layers, *more)
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
        layers, _ = subblock_costs(dataclasses.replace(parent, blocks=changed), workload, *more)
        for i, (_, members) in counted.items():
            by_key |= _in_all_formats(members, {a.layer: layers[i] for a in members}, *more)
    whole = total([*(by_key[a.key] for a in alternatives if a.is_parent), fixed])
    outside = outside_costs(parent, fixed, formats) if formats else {}
    return CostTable(by_key, fixed, whole, workload=workload, outside=outside)


def _in_all_formats(
    alternatives: Sequence[Alternative], layers: Any, formats: Sequence[str], kv_formats: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Key of each alternative, as it is and in each format, to its costs in ``layers``."""
    result = {}
    for a in [*alternatives, *in_formats(alternatives, formats, kv_formats)]:
        costs = layers[a.layer][f"{a.subblock} {a.format}".strip()]
        if a.kv_format:
            kv_bytes = layers[a.layer][f"kv {a.kv_format}"]["kv_cache_bytes"]
            costs = costs | {"kv_cache_bytes": kv_bytes, "memory_bytes": costs["weight_bytes"] + kv_bytes}
        result[a.key] = costs
    return result
