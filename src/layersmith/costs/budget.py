"""Budgets in the words of the user: upper limits on what a child costs.

A throughput is a lower limit on tokens written a second, so an upper one on the time that each takes of the machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from layersmith.errors import UsageError, brief, did_you_mean
from layersmith.recipe import BATCH, CONTEXT, GENERATE
from layersmith.records import check, parse
from layersmith.units import BYTES, COUNTS, SECONDS, TOKENS_A_SECOND, format_cost, split_amount

# Cost -> (the option and key that limits it, what it counts).
COSTS = {
    "parameters": ("params", "count"),
    "active_parameters": ("active_params", "count"),
    "weight_bytes": ("weights", "bytes"),
    "kv_cache_bytes": ("kv_cache", "bytes"),
    "memory_bytes": ("memory", "bytes"),
    "prefill_seconds": ("ttft", "seconds"),
    "decode_seconds": ("time_per_token", "seconds"),
    "token_seconds": ("throughput", "tokens/s"),
}
COST_WORDS = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "weight_bytes": "weights",
    "kv_cache_bytes": "KV cache",
    "memory_bytes": "memory",
    "prefill_seconds": "time to first token",
    "decode_seconds": "time per token",
    "token_seconds": "throughput",
}
COST_OF = {key: cost for cost, (key, _) in COSTS.items()}


def is_time(cost: str) -> bool:
    """Whether a cost is measured, not counted."""
    return cost.endswith("_seconds")


def is_throughput(cost: str) -> bool:
    """Whether a cost is shown as a rate: tokens a second instead of machine time per token."""
    return COSTS.get(cost, ("", ""))[1] == "tokens/s"


@dataclass(frozen=True)
class Limit:
    """One upper limit.

    Attributes:
        cost: a name in :data:`COSTS`.
        fraction: of the parent's, exactly as it was typed, e.g. ``"0.7"``; or None. Of a throughput it is what the
            child's is of the parent's, so more than 1 is faster.
        amount: parameters, bytes, seconds, or tokens a second; or None.
        bits: bits per parameter of the parent, a limit on bytes; or None.
    """

    cost: str
    fraction: str | None = None
    amount: float | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise UsageError(f"budget: unknown cost {self.cost!r}. {did_you_mean(self.cost, COSTS)}")
        given = [x for x in (self.fraction, self.amount, self.bits) if x is not None]
        if len(given) != 1:
            raise UsageError(f"budget {self.cost}: give a fraction or an amount, one of the two.")
        try:
            value = float(given[0])
        except (ValueError, OverflowError):
            value = math.nan
        # An amount of 0 is what a child without attention needs for its KV cache.
        if not 0 <= value < math.inf or (value == 0 and self.amount is None):
            raise UsageError(f"budget {self.cost}: {brief(repr(given[0]))} is no positive number.")

    @staticmethod
    def of(cost: str, limit: float) -> Limit:
        """The limit that :meth:`resolve` gives."""
        return Limit(cost, amount=1 / limit if is_throughput(cost) else limit)

    @property
    def base(self) -> str:
        """The cost of the parent that the limit is relative to."""
        return self.cost if self.bits is None else "parameters"

    def resolve(self, parent: float) -> float:
        """The limit in parameters, bytes or seconds for a parent whose :attr:`base` costs ``parent``."""
        if self.bits is not None:
            return int(Decimal(str(self.bits)) * int(parent) / 8)
        if is_throughput(self.cost):
            return 1 / self.amount if self.amount is not None else parent / float(str(self.fraction))
        if self.amount is not None:
            return self.amount
        if isinstance(parent, int):
            return int(Decimal(str(self.fraction)) * parent)
        return float(str(self.fraction)) * parent

    def __str__(self) -> str:
        what = COST_WORDS[self.cost]
        if self.fraction is not None:
            return f"{what} {float(self.fraction):.4g}x"
        if self.bits is not None:
            return f"{what} {self.bits:g} bits a parameter of the parent"
        assert self.amount is not None
        amount = 1 / self.amount if is_throughput(self.cost) else self.amount
        return f"{what} {format_cost(self.cost, amount)}"


@dataclass(frozen=True)
class Workload:
    """How a model is served: what costs are counted and measured for.

    Attributes:
        batch: Number of sequences at once.
        context: Number of tokens in the KV cache of each.
        generate: Number of these that the model generates; default: ``GENERATE``, at most half of them.
    """

    batch: int = BATCH
    context: int = CONTEXT
    generate: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise UsageError(f"budget {name}: must be a positive whole number below 2**31, got {value!r:.40}.")
        if self.generate is not None:
            if isinstance(self.generate, bool) or not isinstance(self.generate, int) or self.generate < 1:
                raise UsageError(f"budget generate: must be a positive whole number, got {self.generate!r}.")
            if self.generate >= self.context:
                raise UsageError(
                    f"budget generate: {self.generate} tokens leave no prompt in a context of {self.context}."
                )

    @property
    def generated(self) -> int:
        """Number of generated tokens, at least 1."""
        return self.generate or max(1, min(GENERATE, self.context // 2))

    @property
    def prompt(self) -> int:
        """Number of tokens in the prompt, at least 1."""
        return max(1, self.context - self.generated)

    def within(self, longest: int | None) -> Workload:
        """The same workload with a context of at most ``longest`` tokens, the positions of a model."""
        if longest is None or self.context <= longest:
            return self
        generate = self.generate if self.generate is not None and self.generate < longest else None
        return Workload(self.batch, longest, generate)


@dataclass(frozen=True)
class Limits:
    """Upper limits, each on another cost.

    Attributes:
        each: At least one limit.
    """

    each: tuple[Limit, ...]

    def __post_init__(self) -> None:
        if not self.each:
            keys = ", ".join(f"--{key.replace('_', '-')}" for key, _ in COSTS.values())
            raise UsageError(f"no budget: say how small the child must be with one of {keys}.")
        costs = [limit.cost for limit in self.each]
        if len(set(costs)) != len(costs):
            raise UsageError("budget: the same cost is limited twice.")

    def __iter__(self) -> Iterator[Limit]:
        return iter(self.each)

    def __str__(self) -> str:
        return ", ".join(map(str, self.each))

    @property
    def has_times(self) -> bool:
        """Whether a limit is on time, which has to be measured."""
        return any(is_time(limit.cost) for limit in self.each)

    @property
    def counted(self) -> Limits | None:
        """The limits on costs that are counted, not measured; None if all are on times."""
        counted = tuple(limit for limit in self.each if not is_time(limit.cost))
        return Limits(counted) if counted else None

    def resolve(self, parent_costs: Mapping[str, float]) -> dict[str, float]:
        """Cost => its limit in parameters, bytes or seconds."""
        return {limit.cost: limit.resolve(parent_costs[limit.base]) for limit in self.each}

    def to_data(self) -> list[dict[str, Any]]:
        return [
            {"cost": x.cost, "fraction": x.fraction, "amount": x.amount} | ({} if x.bits is None else {"bits": x.bits})
            for x in self.each
        ]

    @staticmethod
    def from_data(data: Any) -> Limits:
        """Raises: UsageError: not what :meth:`to_data` gives."""
        return Limits(tuple(parse(Limit, entry, "budget limits.") for entry in check(data, list[Any], "budget limits")))


@dataclass(frozen=True)
class Budget:
    """What a user asks for. The pipeline takes it apart: the search gets the limits, the costs get the workload.

    Attributes:
        limits: Upper limits on costs of the child.
        workload: What its costs are for.
    """

    limits: Limits
    workload: Workload

    def to_dict(self) -> dict[str, Any]:
        return {"limits": self.limits.to_data(), **dataclasses.asdict(self.workload)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Budget:
        workload = {name: data.get(name) for name in ("batch", "context", "generate")}
        return Budget(Limits.from_data(data.get("limits")), parse(Workload, workload, "budget "))

    @staticmethod
    def parse(value: Any) -> Budget:
        """A budget from a :class:`Budget`, a mapping such as ``{"memory": "10GiB", "batch": 8}``, or a fraction.

        Raises:
            UsageError: A key, unit or number that makes no sense.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            known = [*COST_OF, "bits", "batch", "context", "generate"]
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
    ttft: Any = None,
    time_per_token: Any = None,
    throughput: Any = None,
    bits: Any = None,
    batch: int = BATCH,
    context: int = CONTEXT,
    generate: int | None = None,
    prompt: int | None = None,
) -> Budget:
    """A budget from what was typed; each limit is a fraction of the parent's or an amount with a unit.

    ``bits`` limits the memory of the weights: it is the average number of bits per parameter of the parent. If the
    tokens of the ``prompt`` are given, the context is prompt and generated tokens together.

    Raises:
        UsageError: a unit or number that makes no sense, or no limit at all.
    """
    given = {
        "params": params,
        "active_params": active_params,
        "weights": weights,
        "kv_cache": kv_cache,
        "memory": memory,
        "ttft": ttft,
        "time_per_token": time_per_token,
        "throughput": throughput,
    }
    limits = tuple(parse_limit(COST_OF[key], value) for key, value in given.items() if value is not None)
    if bits is not None:
        limits = (*limits, _bits(bits))
    return Budget(Limits(limits), workload_of(batch, context, generate, prompt))


def workload_of(batch: int, context: int, generate: int | None, prompt: int | None) -> Workload:
    """A workload by its context, or by its prompt if that is given.

    Raises:
        UsageError: A number that makes no sense.
    """
    if prompt is None:
        return Workload(batch, context, generate)
    if prompt < 1:
        raise UsageError(f"budget prompt: must be a positive whole number, got {prompt!r}.")
    generate = GENERATE if generate is None else generate
    return Workload(batch, prompt + generate, generate)


def parse_limit(cost: str, text: Any) -> Limit:
    """One limit, e.g. ``0.7``, ``70%``, ``7B``, ``3_500_000`` or ``10GiB``.

    Raises:
        UsageError: not positive, a fraction above 1, or a unit that does not fit.
    """
    if cost not in COSTS:
        raise UsageError(f"budget: unknown cost {cost!r}. {did_you_mean(cost, COSTS)}")
    option, kind = COSTS[cost]
    example = f"a fraction such as {_FRACTION.get(kind, '0.7')}, or an amount such as {_AMOUNT[kind]}"
    wrong = f"--{option.replace('_', '-')} {text}"
    amount = None if isinstance(text, bool) else split_amount(str(text))
    if amount is None:
        raise UsageError(f"{wrong}: not a budget. Give {example}.")
    number, typed = amount
    unit = typed.upper()
    if number <= 0:
        raise UsageError(f"{wrong}: a budget must be more than nothing. Give {example}.")
    if kind == "tokens/s":
        return _throughput(number, unit, f"{wrong}: {typed!r} is not a unit of throughput. Give {example}.")
    if unit == "%":
        number, unit = number / 100, ""
        if number > 1:
            raise UsageError(f"{wrong}: more than the parent itself. Give {example}.")
    if unit == "" and number <= 1:
        return Limit(cost, fraction=format(number.normalize(), "f"))
    if kind == "count":
        if unit not in COUNTS:
            raise UsageError(f"{wrong}: {typed!r} is not a unit of parameters (K, M, B, T). Give {example}.")
        count = number * COUNTS[unit]
        if unit == "" and (count != int(count) or count < 1000):
            raise UsageError(f"{wrong}: a fraction must be at most 1, and an amount needs a unit. Give {example}.")
        return Limit(cost, amount=int(count))
    units, words = (SECONDS, "time (us, ms, s, min)") if kind == "seconds" else (BYTES, _BYTES_WORDS)
    if kind == "seconds":
        unit = unit.removesuffix("/TOKEN").removesuffix("/TOK").replace("\u00b5", "U").replace("\u039c", "U").strip()
    if unit not in units:
        what = f"{typed!r} is not a unit of" if unit else "an amount needs a unit of"
        raise UsageError(f"{wrong}: {what} {words}. Give {example}.")
    value = number * units[unit]
    return Limit(cost, amount=float(value) if kind == "seconds" else int(value))


def _bits(value: Any) -> Limit:
    amount = None if isinstance(value, bool) else split_amount(str(value))
    if amount is None or amount[1] or not 0 < amount[0] <= 64:
        raise UsageError(f"--bits {value}: not a number of bits. Give bits per parameter of the parent, such as 4.5.")
    return Limit("weight_bytes", bits=float(amount[0]))


_FRACTION = {"tokens/s": "1.5x"}
_AMOUNT = {"count": "7B", "bytes": "10GiB", "seconds": "12ms", "tokens/s": "500tokens/s"}
_BYTES_WORDS = "memory (KiB, MiB, GiB, TiB, KB, MB, GB, TB)"


def _throughput(number: Decimal, unit: str, wrong: str) -> Limit:
    if unit == "%":
        number, unit = number / 100, "X"
    if unit in ("X", ""):
        if unit == "" and number > 20:
            raise UsageError(wrong)
        return Limit("token_seconds", fraction=format(number.normalize(), "f"))
    if unit.replace(" ", "") not in TOKENS_A_SECOND:
        raise UsageError(wrong)
    return Limit("token_seconds", amount=float(number))
