"""Names and numbers for people: what the page, the terminal and the model card call a cost, and how they write it.

A cost that has no name here is called by its own: its last part says its unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from layersmith.search.budget import format_bytes, format_count

COST_LABELS = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "weight_bytes": "weight memory",
    "kv_cache_bytes": "KV cache",
    "memory_bytes": "memory",
}
_UNITS = {"bytes": "bytes", "seconds": "seconds", "tokens_per_second": "tokens a second"}
METRIC_UNITS = {
    "kl_divergence": "nats a token",
    "lm_loss": "nats a token",
    "hidden_distance": "1 − cosine",
}
METRIC_LABELS = {
    "kl_divergence": "KL divergence to the parent",
    "lm_loss": "LM loss",
    "top_1_agreement": "agreement on the next token",
    "top_5_agreement": "agreement within the first 5",
    "top_10_agreement": "agreement within the first 10",
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


def cost_unit(name: str) -> str:
    """``bytes``, ``seconds``, ``tokens a second``; ``count`` where the name says none."""
    return next((unit for end, unit in _UNITS.items() if name.endswith(end)), "count")


def _without_unit(name: str) -> str:
    return next((name.removesuffix(f"_{end}") for end in _UNITS if name.endswith(f"_{end}")), name)


def format_cost(name: str, value: float) -> str:
    """A cost for people: ``4.77M``, ``9.10 MiB`` or ``3.42 ms``."""
    unit = cost_unit(name)
    if unit == "bytes":
        return format_bytes(value)
    if unit == "seconds":
        return format_seconds(value)
    if unit == "tokens a second":
        return f"{value:,.0f} tokens/s"
    return format_count(value)


def format_seconds(value: float) -> str:
    """``0.00342`` as ``3.42 ms``, ``5025`` as ``1 h 24 min``."""
    if value >= 3600:
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours} h {minutes:02} min"
    if value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02} s"
    if value >= 1 or value == 0:
        return f"{value:.1f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def metric_label(name: str) -> str:
    return METRIC_LABELS.get(name, name.replace("_", " "))


def metric_unit(name: str) -> str:
    return METRIC_UNITS.get(name, "share of tokens")


def number(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
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
