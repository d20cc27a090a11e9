"""A solution of the search: one alternative for each subblock of each layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import TypedDict

from layersmith.costs.budget import Limits, Workload
from layersmith.costs.counted import COSTS as COUNTED
from layersmith.errors import InputError
from layersmith.library.alternative import Alternative
from layersmith.records import check, parse
from layersmith.tables import Shown, Table
from layersmith.units import format_cost

_COSTS = ("costs", "parent_costs", "limits")


class _Asked(TypedDict):
    asked: list[Any]
    costs: dict[str, float]
    parent_costs: dict[str, float]
    limits: dict[str, float]


@dataclass(frozen=True, repr=False)
class Solution(Shown):
    """One alternative for each subblock of each layer.

    Attributes:
        alternatives: The alternatives in the order of layers, attention before FFN.
        score: Sum of their losses under the objective.
        costs: Costs of the whole child.
        parent_costs: Costs of the whole parent.
        limits: Upper limits on costs.
        asked: The limits as they were asked for.
        workload: What the costs are for.
        proven_optimal: Whether no other solution within the limits has a lower score.
        bound: No solution within the limits has a lower score than this, if known.
        embeddings: Number format of embeddings and head; empty for the parent's data type.
    """

    alternatives: tuple[Alternative, ...]
    score: float
    costs: dict[str, Any]
    parent_costs: dict[str, Any]
    limits: dict[str, Any]
    asked: Limits
    workload: Workload
    proven_optimal: bool
    bound: float | None = None
    embeddings: str = ""

    def tables(self) -> list[Table]:
        """The layers, and the costs of parent and child."""
        cells: dict[int, dict[str, str]] = {}
        for a in self.alternatives:
            cell = "unchanged" if a.is_parent else f"parent => {a.name}"
            cells.setdefault(a.layer, {})[a.subblock] = cell
        layers = [(str(i), row.get("attention", ""), row.get("ffn", "")) for i, row in sorted(cells.items())]
        costs: list[tuple[str, str, str, str]] = []
        for name, after in self.costs.items():
            before = self.parent_costs[name]
            share = f"{after / before:.2f}x" if before else ""
            costs.append((name, format_cost(name, before), format_cost(name, after), share))
        costs.append(("sum of scores", "", f"{self.score:.4f}", ""))
        headings = ("", "parent", "child", "child / parent")
        return [Table("", ("layer", "attention", "ffn"), layers), Table("", headings, costs, is_numeric=True)]

    def __repr__(self) -> str:
        changed = sum(not a.is_parent for a in self.alternatives)
        before, after = self.parent_costs["parameters"], self.costs["parameters"]
        return (
            f"Solution({changed} of {len(self.alternatives)} subblocks changed, {after / before:.2f}x parameters, "
            f"sum of scores {self.score:.4f})"
        )

    @property
    def has_formats(self) -> bool:
        """Whether some weights are not in the parent's data type."""
        return bool(self.embeddings) or any(a.format for a in self.alternatives)

    def with_formats(self, shapes: Sequence[Alternative]) -> list[Alternative]:
        """Shapes in the number formats of this solution in their places; where it removes, the most frequent one."""
        ((usual, _),) = Counter(a.format for a in self.alternatives if not a.is_no_op).most_common(1) or [("", 0)]
        formats = {(a.layer, a.subblock): (usual if a.is_no_op else a.format, a.kv_format) for a in self.alternatives}
        places = ((a, *formats[a.layer, a.subblock]) for a in shapes)
        return [a.in_format(name).with_kv_format(kv) for a, name, kv in places]

    def to_dict(self) -> dict[str, Any]:
        return {
            "alternatives": [a.to_data() for a in self.alternatives],
            "score": self.score,
            "costs": self.costs,
            "parent_costs": self.parent_costs,
            "limits": self.limits,
            "asked": self.asked.to_data(),
            "workload": dataclasses.asdict(self.workload),
            "proven_optimal": self.proven_optimal,
            "bound": self.bound,
            **({"embeddings": self.embeddings} if self.embeddings else {}),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Solution:
        """Raises: InputError, UsageError: not what :meth:`to_dict` gives."""
        asked = Limits.from_data(check(data, _Asked, "solution.json")["asked"])
        costs, of_parent, limits = (set(data[name]) for name in _COSTS)
        if costs != of_parent or not costs >= {*limits, *COUNTED}:
            raise InputError(f"solution.json: {', '.join(_COSTS)} are not amounts of the same costs.")
        return replace(parse(Solution, data | {"asked": {"each": data["asked"]}}, "solution.json: "), asked=asked)
