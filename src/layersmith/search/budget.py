"""Budgets in the words of the user: upper limits on what a child costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from layersmith.errors import UsageError, did_you_mean
from layersmith.recipe import BATCH, CONTEXT

# Cost -> (the option and key that limits it, what it counts).
COSTS = {
    "parameters": ("params", "count"),
    "active_parameters": ("active_params", "count"),
    "weight_bytes": ("weights", "bytes"),
    "kv_cache_bytes": ("kv_cache", "bytes"),
    "memory_bytes": ("memory", "bytes"),
}
_COST_OF = {key: cost for cost, (key, _) in COSTS.items()}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}


@dataclass(frozen=True)
class Limit:
    """One upper limit.

    Attributes:
        cost: a name in :data:`COSTS`.
        fraction: of the parent's, exactly as it was typed, e.g. ``"0.7"``; or None.
        amount: parameters or bytes; or None.
    """

    cost: str
    fraction: str | None = None
    amount: int | None = None

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise UsageError(f"budget: unknown cost {self.cost!r}. {did_you_mean(self.cost, COSTS)}")
        if (self.fraction is None) == (self.amount is None):
            raise UsageError(f"budget {self.cost}: give a fraction or an amount, one of the two.")

    def resolve(self, parent: int) -> int:
        """The limit in parameters or bytes for a parent that costs ``parent``."""
        if self.amount is not None:
            return self.amount
        return int(Decimal(str(self.fraction)) * parent)

    def __str__(self) -> str:
        what = self.cost.removesuffix("_bytes").replace("_", " ").replace("kv", "KV")
        if self.fraction is not None:
            return f"{what} {float(self.fraction):.4g}x"
        assert self.amount is not None
        return f"{what} {format_bytes(self.amount) if self.cost.endswith('bytes') else format_count(self.amount)}"


@dataclass(frozen=True)
class Budget:
    """Upper limits, and the load for which memory is counted.

    Attributes:
        limits: at least one, on different costs.
        batch: sequences at once.
        context: tokens in the KV cache of each.
    """

    limits: tuple[Limit, ...]
    batch: int = BATCH
    context: int = CONTEXT

    def __post_init__(self) -> None:
        if not self.limits:
            keys = ", ".join(f"--{key.replace('_', '-')}" for key, _ in COSTS.values())
            raise UsageError(f"no budget: say how small the child must be with one of {keys}.")
        for name in ("batch", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"budget {name}: must be a positive whole number, got {value!r}.")
        costs = [limit.cost for limit in self.limits]
        if len(set(costs)) != len(costs):
            raise UsageError("budget: the same cost is limited twice.")

    def resolve(self, parent_costs: Mapping[str, int]) -> dict[str, int]:
        """Cost to its limit in parameters or bytes."""
        return {limit.cost: limit.resolve(parent_costs[limit.cost]) for limit in self.limits}

    def to_dict(self) -> dict[str, Any]:
        limits = [{"cost": x.cost, "fraction": x.fraction, "amount": x.amount} for x in self.limits]
        return {"limits": limits, "batch": self.batch, "context": self.context}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Budget:
        return Budget(tuple(Limit(**entry) for entry in data["limits"]), data["batch"], data["context"])

    @staticmethod
    def parse(value: Any) -> Budget:
        """A budget from a :class:`Budget`, a mapping such as ``{"memory": "10GiB", "batch": 8}``, or a fraction.

        Raises:
            UsageError: a key, unit or number that makes no sense.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            known = [*_COST_OF, "batch", "context"]
            for key in value:
                if key not in known:
                    raise UsageError(f"budget: unknown key {key!r}. {did_you_mean(str(key), known)}")
            return parse_budget(**value)
        return parse_budget(params=value)


def parse_budget(
    *,
    params: Any = None,
    active_params: Any = None,
    weights: Any = None,
    kv_cache: Any = None,
    memory: Any = None,
    batch: int = BATCH,
    context: int = CONTEXT,
) -> Budget:
    """A budget from what was typed; each limit is a fraction of the parent's or an amount with a unit.

    Raises:
        UsageError: a unit or number that makes no sense, or no limit at all.
    """
    given = {
        "params": params,
        "active_params": active_params,
        "weights": weights,
        "kv_cache": kv_cache,
        "memory": memory,
    }
    limits = tuple(parse_limit(_COST_OF[key], value) for key, value in given.items() if value is not None)
    return Budget(limits, batch, context)


def parse_limit(cost: str, text: Any) -> Limit:
    """One limit, e.g. ``0.7``, ``70%``, ``7B``, ``3_500_000`` or ``10GiB``.

    Raises:
        UsageError: not positive, a fraction above 1, or a unit that does not fit.
    """
    if cost not in COSTS:
        raise UsageError(f"budget: unknown cost {cost!r}. {did_you_mean(cost, COSTS)}")
    option, kind = COSTS[cost]
    example = "a fraction such as 0.7, or an amount such as " + ("7B" if kind == "count" else "10GiB")
    wrong = f"--{option.replace('_', '-')} {text}"
    typed = "" if isinstance(text, bool) else str(text).strip().replace("_", "").replace(",", "")
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)", typed)
    if not match:
        raise UsageError(f"{wrong}: not a budget. Give {example}.")
    try:
        number = Decimal(match[1])
    except InvalidOperation as error:
        raise UsageError(f"{wrong}: not a number. Give {example}.") from error
    unit = match[2].upper()
    if number <= 0:
        raise UsageError(f"{wrong}: a budget must be more than nothing. Give {example}.")
    if unit == "%":
        number, unit = number / 100, ""
        if number > 1:
            raise UsageError(f"{wrong}: more than the parent itself. Give {example}.")
    if unit == "" and number <= 1:
        return Limit(cost, fraction=format(number.normalize(), "f"))
    if kind == "count":
        if unit not in _COUNTS:
            raise UsageError(f"{wrong}: {match[2]!r} is not a unit of parameters (K, M, B, T). Give {example}.")
        amount = number * _COUNTS[unit]
        if unit == "" and (amount != int(amount) or amount < 1000):
            raise UsageError(f"{wrong}: a fraction must be at most 1, and an amount needs a unit. Give {example}.")
        return Limit(cost, amount=int(amount))
    if unit not in _BYTES:
        what = f"{match[2]!r} is not a unit of memory" if unit else "an amount of memory needs a unit"
        raise UsageError(f"{wrong}: {what} (KiB, MiB, GiB, TiB, KB, MB, GB, TB). Give {example}.")
    return Limit(cost, amount=int(number * _BYTES[unit]))


def parse_amount(text: str, where: str) -> Decimal:
    """An amount with a unit of memory or of parameters, e.g. ``10GiB`` or ``7B``.

    Raises:
        UsageError: neither.
    """
    match = re.fullmatch(r"([0-9.]+)\s*(%|[A-Za-z]+)", text.strip().replace("_", ""))
    units: dict[str, Any] = {**_COUNTS, **_BYTES, "%": Decimal("0.01")}
    try:
        if match and match[2].upper() in units:
            return Decimal(match[1]) * units[match[2].upper()]
    except InvalidOperation:
        pass
    raise UsageError(f"{where}: {text!r} is not an amount. Give a fraction such as 0.7, or an amount such as 10GiB.")


def format_count(value: float) -> str:
    """``4771392`` as ``4.77M``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f}{unit}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """``9542784`` as ``9.10 MiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.2f} {unit}"
    return f"{value:.0f} B"
