"""Names and numbers as the page, the terminal and the model card write them.

A cost without a label here is called by its name, whose ending is its unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from layersmith.costs.budget import COST_WORDS, is_throughput
from layersmith.report.data import Clock

COST_LABELS = COST_WORDS | {"weight_bytes": "weight memory"}
_UNITS = {"bytes": "bytes", "seconds": "seconds"}
METRIC_UNITS = {
    "kl_divergence": "nats a token",
    "lm_loss": "nats a token",
    "hidden_distance": "1 − cosine",
}
METRIC_LABELS = {
    "kl_divergence": "KL divergence to the parent",
    "lm_loss": "LM loss",
    "top_1_agreement": "top-1 agreement with the parent",
    "top_5_agreement": "top-5 agreement with the parent",
    "top_10_agreement": "top-10 agreement with the parent",
    "hidden_distance": "distance of final hidden states",
}
DASH = "\N{EM DASH}"


def cost_label(name: str) -> str:
    """``"kv_cache_bytes"`` as ``"KV cache"``."""
    if name in COST_LABELS:
        return COST_LABELS[name]
    return _without_unit(name).replace("_", " ")


def ordered_costs(names: Iterable[str]) -> list[str]:
    """Known costs in their order, then others by name."""
    known = list(COST_LABELS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def ratio(name: str, before: float, after: float) -> float | None:
    """Child/parent ratio of a cost, inverted for throughput; None if the parent's is 0."""
    before, after = (after, before) if is_throughput(name) else (before, after)
    return after / before if before else None


def cost_unit(name: str) -> str:
    """Unit of a cost, by the end of its name: ``bytes``, ``seconds``, ``tokens a second`` or ``count``."""
    if is_throughput(name):
        return "tokens a second"
    return next((unit for end, unit in _UNITS.items() if name.endswith(end)), "count")


def _without_unit(name: str) -> str:
    return next((name.removesuffix(f"_{end}") for end in _UNITS if name.endswith(f"_{end}")), name)


def metric_label(name: str) -> str:
    return METRIC_LABELS.get(name, name.replace("_", " "))


def metric_unit(name: str) -> str:
    return METRIC_UNITS.get(name, "share of tokens")


def number(value: float | None, digits: int = 4) -> str:
    """A number with this many decimals; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def with_noise(value: float | None, error: float | None, signed: bool = False, digits: int = 4) -> str:
    """A number and its standard error."""
    if value is None or not math.isfinite(value):
        return DASH
    text = ("+" if signed and value >= 0 else "") + number(value, digits)
    return text if error is None else f"{text} ± {number(error, digits)}"


def share(part: float, whole: float) -> str:
    """``0.698`` of 1 as ``70%``."""
    return f"{part / whole:.0%}" if whole else DASH


def workload_in_words(clock: Clock) -> str:
    """How parent and child were timed: the device and the workload."""
    return (
        f"{'predicted for' if clock.predicted else 'timed on'} {clock.device}: batch {clock.batch}, prompt of "
        f"{clock.prompt:,} tokens, then {clock.generated:,} generated tokens"
    ) + ("; the machine was busy, so these times are uncertain" if clock.is_busy else "")
