"""Amounts with units: reading what people type (``10GiB``, ``12ms``, ``7B``), writing what they read (``9.10 MiB``)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from layersmith.errors import UsageError

# Units of what is typed, in upper case, and what each is worth in parameters, bytes or seconds.
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTES = {
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}
SECONDS = {"US": Decimal("1e-6"), "MS": Decimal("1e-3"), "S": Decimal(1), "MIN": Decimal(60), "H": Decimal(3600)}
TOKENS_A_SECOND = ("TOKENS/S", "TOK/S", "TOKEN/S", "T/S", "/S", "TPS")


def split_amount(text: str) -> tuple[Decimal, str] | None:
    """A number and its unit as typed, ``"3_500 MB"`` as ``(3500, "MB")``; None if it is no number with a unit, or
    so large or small that no amount of anything is."""
    typed = text.strip().replace("_", "").replace(",", "")
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z\u00b5/ ]*)", typed)
    try:
        number = Decimal(match[1]) if match else None
    except InvalidOperation:
        return None
    return (number, match[2].strip()) if match and number is not None and abs(number.adjusted()) <= 30 else None


def parse_amount(text: str, where: str) -> Decimal:
    """An amount of memory, time or parameters in bytes, seconds or parameters, or a percentage as a fraction.

    Args:
        text: What was typed, e.g. ``10GiB``, ``12ms``, ``7B`` or ``70%``.
        where: The key or option, for the error.

    Raises:
        UsageError: The text is not a number with a known unit.
    """
    scales: dict[str, int | Decimal] = {**COUNTS, **BYTES, **SECONDS, "%": Decimal("0.01")}
    amount = split_amount(text)
    if amount is None or amount[0] < 0 or not amount[1] or amount[1].upper() not in scales:
        raise UsageError(
            f"{where}: {text!r} is not an amount. Give a fraction such as 0.7, or an amount such as 10GiB."
        )
    return amount[0] * scales[amount[1].upper()]


def parse_seconds(text: str, where: str) -> float:
    """A length of time such as ``90s``, ``30min`` or ``2h`` in seconds.

    Raises:
        UsageError: The text is not a positive number with a unit of time.
    """
    amount = split_amount(text)
    if amount is None or amount[0] <= 0 or amount[1].upper() not in SECONDS:
        raise UsageError(f"{where}: {text!r} is not a time. Give a number and a unit, such as 90s, 30min or 2h.")
    return float(amount[0] * SECONDS[amount[1].upper()])


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


def format_seconds(value: float) -> str:
    """``0.00342`` as ``3.42 ms``, ``5025`` as ``1 h 24 min``."""
    if round(value) >= 3600:
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours} h {minutes:02} min"
    if value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02} s"
    if value >= 1 or value == 0:
        return f"{value:.1f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def format_whole_seconds(value: float) -> str:
    """A time in whole seconds, at least one."""
    return format_seconds(max(1, round(value)))


def format_cost(name: str, value: float) -> str:
    """A cost in the unit that its name ends with: ``4.77M``, ``9.10 MiB``, ``3.42 ms``.

    ``token_seconds``, the machine's time for each token, is written as a throughput: ``812 tokens/s``.
    """
    if name == "token_seconds":
        return f"{1 / value:,.4g} tokens/s" if value else "no limit"
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("seconds"):
        return format_seconds(value)
    return format_count(value)
